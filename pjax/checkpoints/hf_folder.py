"""Hugging Face folders: safetensors or torch files, single or sharded, memory mapped."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path

import numpy as np

from pjax.checkpoints.base import FolderCheckpoint, read_json
from pjax.checkpoints.safetensors_file import read_safetensors_header
from pjax.checkpoints.stored import StoredTensor
from pjax.checkpoints.torch_zip import read_torch_header
from pjax.errors import CheckpointError, UnsupportedError

OTHER_FORMATS = (".bin", ".pt", ".pth", ".h5", ".msgpack")


@dataclass(frozen=True)
class Layout:
    """The names of one format's files, and what reads their headers."""

    format: str
    single: str
    header: Callable[[Path], dict[str, StoredTensor]]

    @property
    def index(self) -> str:
        """Which file of a sharded checkpoint has which tensor."""
        return f"{self.single}.index.json"


LAYOUTS = (
    Layout("safetensors", "model.safetensors", read_safetensors_header),
    Layout("torch", "pytorch_model.bin", read_torch_header),
)
"""The first that a folder has is read."""


class HFFolder(FolderCheckpoint):
    """A folder with config.json and safetensors, or else torch files.

    Raises CheckpointError when a file is missing or damaged, UnsupportedError when the weights have another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            ggufs = sorted(file.name for file in path.glob("*.gguf"))
            raise CheckpointError(f"{path} has no config.json" + (f"; give one of its GGUF files: {', '.join(ggufs)}" if ggufs else ""))
        self._maps: dict[Path, mmap.mmap] = {}
        layout = next((one for one in LAYOUTS if lexists(path / one.single) or lexists(path / one.index)), None)
        if layout is None:
            others = sorted(file.name for file in path.iterdir() if file.suffix in OTHER_FORMATS)
            if others:
                raise UnsupportedError(f"{path} has {', '.join(others)}; supported: {', '.join(one.single for one in LAYOUTS)} and GGUF")
            raise CheckpointError(f"{path} has no weights: neither " + " nor ".join(f"{one.single} nor {one.index}" for one in LAYOUTS))
        self.format = layout.format
        if lexists(path / layout.single):
            self._tensors = layout.header(check_inside(path, layout.single, "the checkpoint"))
        else:
            self._tensors = self._shards(layout)
        for file in {tensor.file for tensor in self._tensors.values()}:
            with file.open("rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)

    def _shards(self, layout: Layout) -> dict[str, StoredTensor]:
        index = self.path / layout.index
        weight_map = read_json(check_inside(self.path, layout.index, "the checkpoint"), is_unique=True).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
        tensors: dict[str, StoredTensor] = {}
        for shard in sorted(set(weight_map.values())):
            for name, tensor in layout.header(check_inside(self.path, shard, index.name)).items():
                if name in tensors:
                    raise CheckpointError(f"tensor {name} is in {tensors[name].file} and in {tensor.file}, but must be in one file")
                tensors[name] = tensor
        absent = [f"{name} in {shard}" for name, shard in weight_map.items() if name not in tensors or tensors[name].file.name != shard]
        if absent:
            raise CheckpointError(f"{index} names {len(absent)} tensors that its files do not have: {', '.join(absent)}")
        return tensors

    def names(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def dtypes(self) -> dict[str, str]:
        """Name and type of every tensor."""
        return {name: tensor.dtype for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor as a read-only view of its file, strided as the file has it; float64, float32, float16 or bfloat16."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        tensor = self._tensors[name]
        data = self._maps[tensor.file]
        array = tensor.view(name, data)
        if array.size == 0:
            return array
        start = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
        data.madvise(mmap.MADV_WILLNEED, start, min(tensor.offset + array.nbytes, len(data)) - start)  # read ahead in large pieces
        return array

    def close(self) -> None:
        """Forgets the tensors; a file is unmapped with the last array that views it."""
        self._maps, self._tensors = {}, {}


def check_inside(folder: Path, name: str, who: str) -> Path:
    """The path of a file that must lie in a folder, whatever the checkpoint says. CheckpointError when it does not.

    A link may lead to a file of the same folder, or from a snapshot of the hub's cache to that repository's blobs: what an
    index names is written by whoever made the checkpoint, and must not open other files of this machine.
    """
    path = folder / name
    if Path(name).name != name or "\\" in name or "\0" in name or name in (".", ".."):
        raise CheckpointError(f"{folder}: {who} points outside its folder: {name!r:.200}, but must name a file in it")
    try:
        real, home = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} has no {name}, which {who} names: {error}") from error
    homes = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        homes.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(one) for one in homes):
        raise CheckpointError(f"{path} leads to {real}, outside its folder; put the file itself there")
    if not real.is_file():
        raise CheckpointError(f"{path} is no file, but {who} names it")
    return path
