"""Hugging Face folders with safetensors, single or sharded, memory mapped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pjax.errors import CheckpointError, UnsupportedError
from pjax.models.checkpoints.base import Checkpoint, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own bound
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}


class _File:
    """One safetensors file: a header that says where each tensor lies, and the mapped bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
                    raise CheckpointError(f"{path} is truncated or no safetensors file: {size} bytes, header of {header_bytes}")
                header = json.loads(file.read(header_bytes))
            header.pop("__metadata__", None)
            self._start = 8 + header_bytes
            self._data_bytes = size - self._start
            self.tensors: dict[str, tuple[str, tuple[int, ...], int]] = {
                name: self._entry(name, entry) for name, entry in header.items()
            }
        except OSError as error:
            raise CheckpointError(f"{path} can't be read: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} has a damaged safetensors header: {error!r}") from error

    def _entry(self, name: str, entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int]:
        dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
        if not 0 <= begin <= end <= self._data_bytes:
            raise CheckpointError(
                f"{self.path} is truncated: tensor {name} ends at byte {end} of the data, but the file has {self._data_bytes}"
            )
        if dtype in DTYPES and end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
            raise CheckpointError(f"{self.path}: tensor {name} {dtype} {list(shape)} does not take {end - begin} bytes")
        return dtype, shape, begin

    def read(self, name: str) -> np.ndarray:
        """The tensor's bytes, mapped, not copied."""
        dtype, shape, begin = self.tensors[name]
        if dtype not in DTYPES:
            raise UnsupportedError(f"{self.path}: tensor {name} is {dtype}; supported: {', '.join(DTYPES)}")
        if math.prod(shape) == 0:
            return np.zeros(shape, DTYPES[dtype])
        return np.memmap(self.path, np.dtype(DTYPES[dtype]), "r", offset=self._start + begin, shape=shape)


class HFFolder(Checkpoint):
    """A folder with config.json and safetensors."""

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} has no config.json")
        if (path / SINGLE).is_file():
            self._files = [_File(path / SINGLE)]
        elif (path / INDEX).is_file():
            self._files = self._open_shards()
        else:
            others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack"))
            if others:
                raise UnsupportedError(f"{path} has {', '.join(others)}; supported formats: safetensors and GGUF")
            raise CheckpointError(f"{path} has neither {SINGLE} nor {INDEX}")
        self._where = {name: file for file in self._files for name in file.tensors}

    def _open_shards(self) -> list[_File]:
        weight_map = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{self.path / INDEX} has no weight_map of tensor names to file names")
        files: dict[str, _File] = {}
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard:
                raise CheckpointError(f"{self.path / INDEX} points outside its folder: {shard!r}")
            if not (self.path / shard).is_file():
                raise CheckpointError(f"{self.path} has no {shard}, which {INDEX} names")
            files[shard] = _File(self.path / shard)
        absent = [f"{name} in {shard}" for name, shard in weight_map.items() if name not in files[shard].tensors]
        if absent:
            raise CheckpointError(f"{self.path / INDEX} names tensors that its files do not have: {', '.join(absent)}")
        return list(files.values())

    def hf_config(self) -> dict[str, Any]:
        """config.json."""
        return read_json(self.path / "config.json")

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or nothing."""
        path = self.path / "generation_config.json"
        return read_json(path) if path.is_file() else {}

    def names(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        return {name: file.tensors[name][1] for name, file in self._where.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, memory mapped."""
        return self._where[name].read(name)
