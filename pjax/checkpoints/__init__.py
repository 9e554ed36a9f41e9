"""Checkpoint readers, one module a format; each reads one tensor at a time."""

from __future__ import annotations

from pathlib import Path

from pjax.checkpoints.base import Checkpoint
from pjax.checkpoints.magic import is_gguf, refuse_lfs_pointer
from pjax.errors import CheckpointError
from pjax.machine import expand_user


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Opens a Hugging Face folder, a folder of `pjax.convert`, a GGUF file, or a model of the hub (downloaded first, with a progress bar).

    Raises CheckpointError when there is no such thing or it is damaged, UnsupportedError for other formats.
    """
    path = expand_user(model)
    if not path.exists():
        from pjax.checkpoints.hub import download

        path = download(str(model))
    if path.is_file():
        refuse_lfs_pointer(path)
        if path.suffix != ".gguf" and not is_gguf(path):
            raise CheckpointError(f"model {path} is a file, but must be a folder, a GGUF file or a hub id")
        from pjax.checkpoints.gguf_file import GGUFFile

        return GGUFFile(path)
    if (path / "pjax_parameters.json").is_file():
        from pjax.checkpoints.orbax_folder import OrbaxFolder

        return OrbaxFolder(path)
    from pjax.checkpoints.hf_folder import HFFolder

    return HFFolder(path)
