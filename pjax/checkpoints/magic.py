"""What a file is, by its first bytes."""

from __future__ import annotations

from pathlib import Path

from pjax.errors import CheckpointError

GGUF_MAGIC = b"GGUF"
LFS_START = b"version https://git-lfs.github.com/spec/"


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, whatever its name: an ollama blob has no suffix."""
    with path.open("rb") as file:
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC


def refuse_lfs_pointer(path: Path) -> None:
    """Raises CheckpointError where Git left a pointer in the place of a large file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_START))
    except OSError:  # the reader of the file names what is wrong with it
        return
    if start == LFS_START:
        raise CheckpointError(f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull` in its folder, or download it")
