"""Checkpoint readers: one file a format, each gives (name, array) one tensor at a time."""

from __future__ import annotations

from pathlib import Path

from pjax.errors import CheckpointError
from pjax.models.checkpoints.base import Checkpoint

DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "*.model")


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Opens a Hugging Face folder, a .gguf file, or a hub id (downloaded first, with a progress bar).

    Raises CheckpointError when there is no such thing or it is damaged, UnsupportedError for other formats.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"model {path} is a file, but must be a folder, a .gguf file or a hub id")
        from pjax.models.checkpoints.gguf_file import GGUFFile

        return GGUFFile(path)
    if not path.is_dir():
        path = download(str(model))
    from pjax.models.checkpoints.hf_folder import HFFolder

    return HFFolder(path)


def download(hub_id: str) -> Path:
    """The local folder of a model of the Hugging Face hub; only files that pjax reads are fetched."""
    if hub_id.startswith((".", "/", "~")) or hub_id.endswith(".gguf") or hub_id.count("/") != 1:
        raise CheckpointError(f"model {hub_id} does not exist; give a folder, a .gguf file or a hub id such as owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"model {hub_id} is neither a local path nor can it be downloaded from the hub: {error}") from error
