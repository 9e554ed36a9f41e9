"""What writes checkpoints, shard by shard: safetensors with Hugging Face's names, or pjax's parameters in orbax."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pjax.checkpoints.copying import copy_and_check
from pjax.checkpoints.orbax_folder import Parameter, write_group, write_manifest
from pjax.checkpoints.stored import DTYPES
from pjax.checkpoints.weights import Source
from pjax.errors import UnsupportedError

FORMATS = ("safetensors", "orbax")
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # of the safetensors format
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """One file or folder, the tensors or parameters in it, and their bytes."""

    name: str
    keys: tuple[str, ...]
    num_bytes: int


class Tensors(Protocol):
    """What `pjax.checkpoints.tensors.ModelTensors` has, which is above this module."""

    @property
    def sources(self) -> Mapping[str, Source]: ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def rows(self, name: str) -> Any: ...


def make_writer(format: str, tensors: Tensors, dtype: str, max_shard_size: int) -> SafetensorsWriter | OrbaxWriter:
    """The writer of one of `FORMATS`. UnsupportedError when a parameter is made of several tensors by a recipe."""
    made = [key for key, source in tensors.sources.items() if source.recipe is not None]
    if made:
        raise UnsupportedError(f"conversion does not write parameters that are made of several tensors by a recipe: {', '.join(made[:5])}")
    return (SafetensorsWriter if format == "safetensors" else OrbaxWriter)(tensors, dtype, max_shard_size)


class SafetensorsWriter:
    """`model.safetensors`, or `model-00001-of-00003.safetensors` and so on with their index. Holds one tensor at a time."""

    def __init__(self, tensors: Tensors, dtype: str, max_shard_size: int) -> None:
        self._tensors, self._dtype = tensors, dtype
        self._shapes = tensors.shapes
        sizes = {name: math.prod(shape) * DTYPES[dtype].itemsize for name, shape in self._shapes.items()}
        self.shards = _split(sizes, max_shard_size, _file_name)

    def write(self, path: Path, shard: Shard, bad: list[str]) -> None:
        """One file: 8 bytes of length, a JSON header, the tensors; `bad` gets the names of those with NaN or infinite values."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in shard.keys:
            end = at + math.prod(self._shapes[name]) * DTYPES[self._dtype].itemsize
            header[name] = {"dtype": NAMES[self._dtype], "shape": self._shapes[name], "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors are aligned
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in shard.keys:
                array = np.empty(self._shapes[name], DTYPES[self._dtype])
                if count := copy_and_check(array, self._tensors.rows(name)):
                    bad.append(f"{name} ({count} of {array.size})")
                file.write(array.reshape(-1).view(np.uint8).data)

    def finish(self, folder: Path) -> None:
        """The index, where there are several files."""
        if len(self.shards) > 1:
            index = {
                "metadata": {"total_size": sum(shard.num_bytes for shard in self.shards)},
                "weight_map": {name: shard.name for shard in self.shards for name in shard.keys},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


class OrbaxWriter:
    """`params-00001-of-00003` and so on, and their manifest. Holds one shard at a time."""

    def __init__(self, tensors: Tensors, dtype: str, max_shard_size: int) -> None:
        self._tensors, self._dtype = tensors, dtype
        shapes = {key: one.shape for key, one in tensors.sources.items()}
        sizes = {key: math.prod(shape) * DTYPES[dtype].itemsize for key, shape in shapes.items()}
        self.shards = _split(sizes, max_shard_size, _folder_name)
        self._parameters = {key: Parameter(shard.name, dtype, tensors.sources[key]) for shard in self.shards for key in shard.keys}

    def write(self, path: Path, shard: Shard, bad: list[str]) -> None:
        """One orbax checkpoint; `bad` gets the names of tensors with NaN or infinite values."""
        for left in path.parent.glob(f"{path.name}.*"):  # orbax's own unfinished folders
            for file in sorted(left.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            left.rmdir()
        arrays = {}
        for key in shard.keys:
            arrays[key] = np.empty(self._parameters[key].shape, DTYPES[self._dtype])
            self._tensors.sources[key].fill(arrays[key], self._tensors.rows, bad)
        write_group(path, arrays)

    def finish(self, folder: Path) -> None:
        """The manifest."""
        write_manifest(folder, self._parameters)


def _split(sizes: Mapping[str, int], most: int, name: Callable[[int, int], str]) -> list[Shard]:
    """Fills shards in the order of the tensors; none is larger than `most` unless one tensor is."""
    groups: list[list[str]] = [[]]
    size = 0
    for key, num_bytes in sizes.items():
        if groups[-1] and size + num_bytes > most:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += num_bytes
    return [Shard(name(i, len(groups)), tuple(keys), sum(sizes[key] for key in keys)) for i, keys in enumerate(groups)]


def _file_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"


def _folder_name(index: int, count: int) -> str:
    return f"params-{index + 1:05}-of-{count:05}"
