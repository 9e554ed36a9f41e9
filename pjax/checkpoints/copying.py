"""Copies of tensors: cast or dequantised into the memory where they stay, and checked for NaN and infinite values on the way.

The native library does it in one pass and without the interpreter's lock, so that whatever else starts up goes on beside it; numpy does
what the library does not have, and all where it was not built. The numbers are the same, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from pjax import native
from pjax.checkpoints.quantised import Quantised
from pjax.machine import num_cpus

T = TypeVar("T")
NUM_THREADS = min(num_cpus(), 8)  # that copy weights
CHUNK = 1 << 16  # elements copied and checked at once by numpy
NATIVE_KINDS = {"float32": 0, "float16": 1, "bfloat16": 2, "Q8_0": 3, "Q4_0": 4, "Q4_1": 5}
"""What the native library reads: numpy's types, and GGUF's."""
NATIVE_TARGETS = {"float32": 1, "bfloat16": 0}
_EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}  # all ones: NaN or infinite


def copy_and_check(target: np.ndarray, array: np.ndarray) -> int:
    """Casts `array` into `target`, contiguous and of the same shape; how many values are NaN or infinite then.

    Whole numbers go into whole numbers as they are. Raises TypeError when the target's type does not hold all of the array's.
    """
    if target.dtype.kind in "iu":
        np.copyto(target, array, casting="safe")
        return 0
    if target.ndim == 0:
        return _copy_and_check(target[None], array[None], 0, 1)
    copy = _by_native(target, array) or partial(_copy_and_check, target, array)
    return sum(in_parts(copy, len(target), target.size))


def _by_native(target: np.ndarray, array: Any) -> Callable[[int, int], int] | None:
    """`_copy_and_check` by the native library, where it has the types."""
    source, kind = (array.blocks, array.kind) if isinstance(array, Quantised) else (array, array.dtype.name)
    plain = array.shape == target.shape and all(one.flags.c_contiguous and one.dtype.isnative for one in (source, target))
    if kind not in NATIVE_KINDS or target.dtype.name not in NATIVE_TARGETS or not plain or (library := native.library()) is None:
        return None

    def copy(first: int, last: int) -> int:
        rows, to = source[first:last], target[first:last]
        count = library.PjaxCopyWeights(NATIVE_KINDS[kind], rows.ctypes.data, NATIVE_TARGETS[to.dtype.name], to.ctypes.data, to.size)
        return int(count)

    return copy


def _copy_and_check(target: np.ndarray, array: np.ndarray, first: int, last: int) -> int:
    """By numpy, a few rows at a time: what is checked is still in the processor's cache (docs/checkpoints.md has the figures)."""
    step, count = _rows_at_once(target), 0
    scratch = np.empty((min(step, last - first), *target.shape[1:]), f"u{target.dtype.itemsize}")
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(first, last, step):
            rows = target[start : min(start + step, last)]
            _cast(rows, array[start : start + len(rows)])
            count += _count(rows, scratch)
    return count


def count_not_finite(array: np.ndarray) -> int:
    """How many values are NaN or infinite, of a contiguous array of float32, bfloat16 or float16."""
    array = array.reshape(-1)

    def count(first: int, last: int) -> int:
        scratch = np.empty(min(CHUNK, last - first), f"u{array.dtype.itemsize}")
        return sum(_count(array[start : min(start + CHUNK, last)], scratch) for start in range(first, last, CHUNK))

    return sum(in_parts(count, len(array), len(array)))


def _rows_at_once(array: np.ndarray) -> int:
    return max(CHUNK * len(array) // max(array.size, 1), 1)


def _count(rows: np.ndarray, scratch: np.ndarray) -> int:
    """NaN and infinite values of rows, for whose bits there is room in `scratch`."""
    exponent = np.array(_EXPONENTS[rows.dtype.name], scratch.dtype)
    bits = np.bitwise_and(rows.view(scratch.dtype), exponent, out=scratch[: len(rows)])
    return int(np.count_nonzero(bits == exponent)) if bits.size and bits.max() == exponent else 0


def in_parts(function: Callable[[int, int], T], length: int, num_values: int) -> list[T]:
    """`function(first, last)` for parts of a range, side by side in a few threads where there are many values to go through."""
    parts = min(NUM_THREADS, length) if num_values > 8 * CHUNK else 1
    ends = [length * part // parts for part in range(parts + 1)]
    if parts == 1:
        return [function(0, length)]
    return list(_threads().map(function, ends[:-1], ends[1:]))


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    """Those that copy and dequantise; numpy gives up the interpreter's lock meanwhile."""
    return ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="pjax-copy")


def _cast(target: np.ndarray, array: np.ndarray) -> None:
    """target[...] = array; float16 by a table of its values, 1.7 times as fast as numpy's own conversion."""
    if array.dtype != np.float16 or target.dtype == np.float16:
        target[...] = array
        return
    bits = f"u{target.itemsize}"
    np.take(_float16_as(target.dtype.name).view(bits), array.view(np.uint16), out=target.view(bits), mode="clip")


@lru_cache(maxsize=4)
def _float16_as(dtype: str) -> np.ndarray:
    """Every float16 by its bits, in another type."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(numpy_dtype(dtype))


def numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """A parameter's type in numpy, or ml_dtypes."""
    return np.dtype(ml_dtypes.bfloat16) if str(dtype) == "bfloat16" else np.dtype(dtype)
