"""GGUF files, one tensor at a time; quantised ones are dequantised where their rows are taken."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pjax.checkpoints.base import Checkpoint
from pjax.checkpoints.gguf_config import ROPE_FACTORS, check_architecture, hf_config
from pjax.checkpoints.gguf_header import TensorInfo
from pjax.checkpoints.gguf_parts import read_headers
from pjax.checkpoints.gguf_types import BLOCKS
from pjax.checkpoints.gguf_types import GGUFType as Type
from pjax.checkpoints.quantised import Quantised, dequantised
from pjax.errors import CheckpointError, UnsupportedError

PLAIN = {
    Type.F64: np.dtype(np.float64),
    Type.F32: np.dtype(np.float32),
    Type.F16: np.dtype(np.float16),
    Type.BF16: np.dtype(ml_dtypes.bfloat16),
}


class GGUFFile(Checkpoint):
    """A .gguf file of one of `gguf_config.ARCHITECTURES`, or all parts of one: `path` and `header` are the first's then.

    Raises CheckpointError when a file is missing, damaged or truncated, UnsupportedError when it is big-endian, or of an architecture
    or with a tensor of a type that pjax does not have.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        headers = read_headers(path)
        self.header = header = headers[0]
        self.path, self._metadata = header.path, header.metadata
        self._tensors: dict[str, tuple[TensorInfo, np.ndarray]] = {}
        for part in headers:
            data = np.memmap(part.path, np.uint8, mode="r")
            self._tensors |= {name: (info, data) for name, info in part.tensors.items()}
            for name, info in part.tensors.items():
                end = info.offset + math.prod(self._byte_shape(name, info))
                if end > data.size:
                    raise CheckpointError(
                        f"{part.path} is damaged or truncated: tensor {name} ends at byte {end}, but the file has {data.size}"
                    )

    def hf_config(self) -> dict[str, Any]:
        """config.json as transformers would write it for the same model.

        Raises CheckpointError when a field is missing or wrong, UnsupportedError when one is not applied by pjax.
        """
        factors = self.read(ROPE_FACTORS) if ROPE_FACTORS in self._tensors else None
        return hf_config(self._metadata, {name: info.shape for name, (info, _) in self._tensors.items()}, factors, self.path)

    def generation_config(self) -> dict[str, Any]:
        """GGUF has none."""
        return {}

    def names(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor but those that belong to the config; GGUF's fastest axis comes last here."""
        return {name: info.shape for name, (info, _) in self._tensors.items() if name != ROPE_FACTORS}

    def dtypes(self) -> dict[str, str]:
        """What `read` gives: dequantised tensors are float32."""
        return {name: PLAIN.get(Type(info.kind), np.dtype(np.float32)).name for name, (info, _) in self._tensors.items()}

    def _byte_shape(self, name: str, info: TensorInfo) -> tuple[int, ...]:
        """A tensor's shape with its last axis in bytes."""
        if info.kind not in BLOCKS:
            check_architecture(self._metadata, self.path)  # which says more than the type does
            raise UnsupportedError(f"{self.path}: tensor {name} {_unsupported(info.kind)}; supported: {', '.join(t.name for t in BLOCKS)}")
        kind = Type(info.kind)
        block, size = BLOCKS[kind]
        if info.shape[-1] % block:
            raise CheckpointError(f"{self.path}: tensor {name} has rows of {info.shape[-1]}, but {kind.name} packs {block} at a time")
        return (*info.shape[:-1], info.shape[-1] // block * size)

    def read(self, name: str) -> np.ndarray:
        """One tensor: floating types are views of the mapped file, the rest is dequantised to float32.

        Rows keep GGUF's order (of llama's rotary pairs, say), and kernels are [out, in].
        """
        return np.asarray(self.rows(name))

    def rows(self, name: str) -> Any:
        """As `read`, but what has to be dequantised is so where its rows are taken."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        info, part = self._tensors[name]
        shape, kind, byte_shape = info.shape, Type(info.kind), self._byte_shape(name, info)
        data = np.asarray(part[info.offset : info.offset + math.prod(byte_shape)])
        if kind in PLAIN:
            return data.view(PLAIN[kind]).reshape(shape)
        return Quantised(data, shape, kind) if len(shape) > 1 else dequantised(data, math.prod(shape), kind)

    def close(self) -> None:
        """Forgets the tensors; the file is unmapped with the last array that views it."""
        self._tensors = {}


def _unsupported(kind: int) -> str:
    from gguf.constants import GGMLQuantizationType

    return f"is {GGMLQuantizationType(kind).name}" if kind in list(GGMLQuantizationType) else f"has the unknown type {kind}"
