"""Checkpoint readers, one module a format; each reads one tensor at a time."""

from __future__ import annotations

from pathlib import Path

from pjax.checkpoints.base import Checkpoint
from pjax.errors import CheckpointError

DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
TORCH_FILES = ("pytorch_model*.bin",)  # fetched where there are no safetensors
NOT_DOWNLOADED = ("*/*", "consolidated*")  # other formats' folders; a second copy of the weights in Mistral's own layout


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Opens a Hugging Face folder, a folder of `pjax.convert`, a .gguf file, or a hub id (downloaded first, with a progress bar).

    Raises CheckpointError when there is no such thing or it is damaged, UnsupportedError for other formats.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"model {path} is a file, but must be a folder, a .gguf file or a hub id")
        from pjax.checkpoints.gguf_file import GGUFFile

        return GGUFFile(path)
    if not path.is_dir():
        path = download(str(model))
    if (path / "pjax_parameters.json").is_file():
        from pjax.checkpoints.orbax_folder import OrbaxFolder

        return OrbaxFolder(path)
    from pjax.checkpoints.hf_folder import HFFolder

    return HFFolder(path)


def download(hub_id: str) -> Path:
    """The local folder of a model of the Hugging Face hub; only files that pjax reads are fetched.

    Raises CheckpointError when `hub_id` is no owner/name, or the download fails and no copy is cached.
    """
    if hub_id.startswith((".", "/", "~")) or hub_id.endswith(".gguf") or hub_id.count("/") != 1:
        raise CheckpointError(f"model {hub_id} does not exist; give a folder, a .gguf file or a hub id such as owner/name")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(DOWNLOADED), ignore_patterns=list(NOT_DOWNLOADED)))
        if any(folder.glob("*.safetensors")):
            return folder
        return Path(snapshot_download(hub_id, allow_patterns=[*DOWNLOADED, *TORCH_FILES], ignore_patterns=list(NOT_DOWNLOADED)))
    except Exception as error:  # the hub client lets errors of its HTTP library through, which is not the same in all versions
        raise CheckpointError(f"model {hub_id} is neither a local path nor can it be downloaded from the hub: {error}") from error
