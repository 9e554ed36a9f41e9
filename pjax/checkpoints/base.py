"""What every checkpoint reader gives."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pjax.checkpoints.gguf_header import GGUFHeader
from pjax.checkpoints.magic import refuse_lfs_pointer
from pjax.errors import CheckpointError


class Checkpoint(ABC):
    """A checkpoint whose tensors are read one at a time. A context manager: leaving it closes its files.

    Attributes:
      format: "safetensors", "torch", "gguf" or "orbax".
      path: the folder or file.
      header: of a GGUF file.
    """

    format: str
    path: Path
    header: GGUFHeader | None = None

    @abstractmethod
    def hf_config(self) -> dict[str, Any]:
        """The content of config.json, or the same made from other metadata."""

    @abstractmethod
    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json; empty when there is none."""

    @abstractmethod
    def names(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape, slowest axis first; reads no data."""

    @abstractmethod
    def dtypes(self) -> dict[str, str]:
        """Every tensor's type as numpy names it, or the name that its format has for it; reads no data."""

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One tensor of the shape that `names` says, in a dtype of numpy or ml_dtypes.

        Raises CheckpointError when there is no such tensor, UnsupportedError when its type is not supported.
        """

    def rows(self, name: str) -> Any:
        """As `read`; what it gives may be made only where rows are taken, by slices of the first axis and in any thread."""
        return self.read(name)

    def close(self) -> None:
        """Closes what is open; nothing can be read afterwards. Arrays that were read stay valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class FolderCheckpoint(Checkpoint):
    """A checkpoint in a folder with Hugging Face's config files."""

    def hf_config(self) -> dict[str, Any]:
        """config.json."""
        return read_json(self.path / "config.json")

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or nothing."""
        path = self.path / "generation_config.json"
        return read_json(path) if path.is_file() else {}


def read_json(path: Path, *, is_unique: bool = False) -> dict[str, Any]:
    """A JSON object; CheckpointError names the file when it is none, or where `is_unique` has a name twice."""
    refuse_lfs_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique if is_unique else None)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, but must hold an object")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members; ValueError when one is there twice. For `json.loads(object_pairs_hook=...)`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found
