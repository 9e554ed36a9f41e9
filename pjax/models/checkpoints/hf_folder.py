"""Hugging Face folders with safetensors, single or sharded, memory mapped."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pjax.errors import CheckpointError, UnsupportedError
from pjax.models.checkpoints.base import Checkpoint, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = ("F64", "F32", "F16", "BF16")
OTHER_FORMATS = (".bin", ".pt", ".pth", ".h5", ".msgpack")


class HFFolder(Checkpoint):
    """A folder with config.json and safetensors.

    Raises CheckpointError when a file is missing or damaged, UnsupportedError when the weights have another format.
    """

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} has no config.json")
        self._open_files = ExitStack()
        self._files: dict[str, Any] = {}  # file name -> safe_open handle
        self._where: dict[str, str] = {}  # tensor name -> file name
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        if (self.path / SINGLE).is_file():
            self._open_file(SINGLE)
        elif (self.path / INDEX).is_file():
            self._open_shards()
        else:
            others = sorted(file.name for file in self.path.iterdir() if file.suffix in OTHER_FORMATS)
            if others:
                raise UnsupportedError(f"{self.path} has {', '.join(others)}; supported formats: safetensors and GGUF")
            raise CheckpointError(f"{self.path} has neither {SINGLE} nor {INDEX}")

    def _open_file(self, name: str) -> None:
        try:
            file = self._open_files.enter_context(safe_open(str(self.path / name), framework="np"))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / name} is damaged, truncated or no safetensors file: {error}") from error
        self._files[name] = file
        self._where |= dict.fromkeys(file.keys(), name)

    def _open_shards(self) -> None:
        index = self.path / INDEX
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard or shard == "..":
                raise CheckpointError(f"{index} points outside its folder: {shard!r}")
            if not (self.path / shard).is_file():
                raise CheckpointError(f"{self.path} has no {shard}, which {INDEX} names")
            self._open_file(shard)
        held = {shard: set(file.keys()) for shard, file in self._files.items()}
        absent = [f"{name} in {shard}" for name, shard in weight_map.items() if name not in held[shard]]
        if absent:
            raise CheckpointError(f"{index} names {len(absent)} tensors that its files do not have: {', '.join(absent)}")
        self._where |= weight_map  # which of two files counts when both have a tensor

    def hf_config(self) -> dict[str, Any]:
        """config.json."""
        return read_json(self.path / "config.json")

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or nothing."""
        path = self.path / "generation_config.json"
        return read_json(path) if path.is_file() else {}

    def names(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        return {name: tuple(self._files[file].get_slice(name).get_shape()) for name, file in self._where.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, copied out of the mapped file; float64, float32, float16 or bfloat16."""
        if name not in self._where:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        file = self._files[self._where[name]]
        dtype = file.get_slice(name).get_dtype()
        if dtype not in DTYPES:
            raise UnsupportedError(f"{self.path / self._where[name]}: tensor {name} is {dtype}; supported: {', '.join(DTYPES)}")
        array: np.ndarray = file.get_tensor(name)
        return array

    def close(self) -> None:
        """Closes the files."""
        self._open_files.close()
        self._files.clear()
        self._where.clear()
