"""Where a tensor lies in a file, and the array that views it there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pjax.errors import CheckpointError, UnsupportedError

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""Types of weights."""

READABLE: dict[str, np.dtype[Any]] = DTYPES | {
    name: np.dtype(name).newbyteorder("<") for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
}
"""Types of tensors that a weight is made of. Tensors of other types may be in a file, but can't be read."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, little-endian. Its bytes are checked to lie inside the file by whoever makes this."""

    file: Path
    dtype: str  # numpy's name
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    offset: int  # of its first byte in the file

    def view(self, name: str, data: mmap) -> np.ndarray:
        """The tensor as a view of the mapped file `data`. UnsupportedError when its type is none of `READABLE`."""
        if self.dtype not in READABLE:
            raise UnsupportedError(f"{self.file}: tensor {name} is {self.dtype}; supported: {', '.join(READABLE)}")
        dtype = READABLE[self.dtype]
        if 0 in self.shape:
            return np.empty(self.shape, dtype)
        strides = tuple(step * dtype.itemsize for step in self.strides)
        try:
            return np.ndarray(self.shape, dtype, data, self.offset, strides)
        except (ValueError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{self.file} is damaged: tensor {name} of shape {list(self.shape)}: {error}") from error


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor that lies in one piece."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
