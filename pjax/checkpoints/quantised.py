"""Tensors of GGUF blocks, dequantised where their rows are taken."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pjax.checkpoints.gguf_types import BLOCKS, GGUFType
from pjax.errors import UnsupportedError

CHUNK_ELEMENTS = 1 << 16  # dequantised at once: temporaries that stay in the second cache, three times as fast as with 1 << 18


class Quantised:
    """A tensor whose slices of rows are float32 arrays, made when they are taken; all else is of the whole tensor as an array.

    Chosen rows, by an array of their numbers, are such a tensor again. Whoever copies it a few rows at a time, in several threads,
    never has all of it in memory.

    Args:
      data: uint8, the blocks of all rows one after the other.
      shape: of the tensor, at least two axes; the last is a multiple of the block.

    Attributes:
      kind: GGUF's name of its type.
      blocks: uint8 [rows, bytes].
    """

    def __init__(self, data: np.ndarray, shape: tuple[int, ...], kind: GGUFType) -> None:
        self.shape, self.size, self.dtype = shape, math.prod(shape), np.dtype(np.float32)
        self._type, self.kind, self.blocks = kind, kind.name, data.reshape(shape[0], -1)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, np.ndarray) and index.ndim == 1 and index.dtype.kind == "i":
            return Quantised(self.blocks[index], (len(index), *self.shape[1:]), self._type)
        if not isinstance(index, slice) or index.step not in (None, 1):
            return self.__array__()[index]
        rows = self.blocks[index]
        values = dequantised(rows.reshape(-1), len(rows) * (self.size // max(len(self), 1)), self._type)
        return values.reshape(len(rows), *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # numpy would take the memory of an array that nobody keeps, by its __array_interface__
            raise AttributeError(name)
        return getattr(self.__array__(), name)


def dequantised(data: np.ndarray, num_values: int, kind: GGUFType) -> np.ndarray:
    """float32 [num_values] of blocks, uint8 and one after the other, by the `gguf` package.

    Raises UnsupportedError when the package that is installed does not have the type.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    if kind.name not in GGMLQuantizationType.__members__:
        raise UnsupportedError(f"the installed gguf package does not dequantise {kind.name}; pip install -U gguf")
    (block, size), theirs = BLOCKS[kind], GGMLQuantizationType(kind)
    step = CHUNK_ELEMENTS // block
    if 0 < num_values <= step * block:
        return dequantize(data, theirs)  # as one long row, which it takes in one piece
    values = np.empty(num_values, np.float32)
    for start in range(0, num_values // block, step):
        values[start * block : (start + step) * block] = dequantize(data[start * size : (start + step) * size], theirs)
    return values
