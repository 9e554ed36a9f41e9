"""The header of a GGUF file: its metadata and where its tensors lie, read in one pass.

The `gguf` package's own reader makes several array objects for every string of the vocabulary: seconds of start-up.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pjax.checkpoints.magic import GGUF_MAGIC, refuse_lfs_pointer
from pjax.errors import CheckpointError, UnsupportedError

# Types of metadata values, of the format's specification.
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9
SIZE = struct.Struct("<Q")
VERSIONS = (2, 3)
MAX_DIMS = 4


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file."""

    shape: tuple[int, ...]  # slowest axis first
    kind: int  # GGML's number of its type
    offset: int  # of its first byte in the file


@dataclass(frozen=True)
class GGUFHeader:
    """What stands before the tensors' data."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_gguf_header(path: Path) -> GGUFHeader:
    """The header. Raises CheckpointError when the file is no GGUF, damaged or truncated, UnsupportedError when it is big-endian."""
    refuse_lfs_pointer(path)
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
            if magic != GGUF_MAGIC:
                raise CheckpointError(f"{path} is no GGUF file: it begins with {magic!r}, but must begin with b'GGUF'")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(path, data)
    except (struct.error, ValueError, KeyError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error!r}") from error


def _read(path: Path, data: mmap.mmap) -> GGUFHeader:
    version, num_tensors, num_fields = _unpack("<IQQ", data, 4)
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise UnsupportedError(f"{path} is big-endian; supported: little-endian GGUF files")
    if version not in VERSIONS:
        raise ValueError(f"version is {version}, but must be one of {VERSIONS}")
    at = 24
    metadata: dict[str, Any] = {}
    for _ in range(num_fields):
        (key,), at = _strings(data, at, 1)
        (kind,) = _unpack("<I", data, at)
        metadata[key], at = _value(data, at + 4, kind)
    places: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        (name,), at = _strings(data, at, 1)
        (rank,) = _unpack("<I", data, at)
        if not 0 < rank <= MAX_DIMS:
            raise ValueError(f"tensor {name} has {rank} dimensions, but must have 1 to {MAX_DIMS}")
        *shape, kind, offset = _unpack(f"<{rank}QIQ", data, at + 4)
        at += 16 + 8 * rank
        if name in places:
            raise ValueError(f"tensor {name} is there twice")
        places[name] = (tuple(reversed(shape)), kind, offset)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}, but must be an integer >= 1")
    start = -(-at // alignment) * alignment
    return GGUFHeader(path, metadata, {name: TensorInfo(shape, kind, start + offset) for name, (shape, kind, offset) in places.items()})


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """One metadata value and where the next thing begins."""
    if kind == STRING:
        values, at = _strings(data, at, 1)
        return values[0], at
    if kind == ARRAY:
        kind, count = _unpack("<IQ", data, at)
        if kind == STRING:
            return _strings(data, at + 12, count)
        if kind == ARRAY:
            at, inner = at + 12, []
            for _ in range(count):
                value, at = _value(data, at, ARRAY)
                inner.append(value)
            return inner, at
        return _numbers(data, at + 12, kind, count)
    values, at = _numbers(data, at, kind, 1)
    return values[0], at


def _numbers(data: mmap.mmap, at: int, kind: int, count: int) -> tuple[list[Any], int]:
    dtype = np.dtype(NUMBERS[kind])
    end = at + count * dtype.itemsize
    if end > len(data):
        raise _short(at, end, data)
    return np.frombuffer(data[at:end], dtype).tolist(), end


def _strings(data: mmap.mmap, at: int, count: int) -> tuple[list[str], int]:
    values = []
    for _ in range(count):
        start = at + 8
        if start > len(data):
            raise _short(start, start, data)
        at = start + SIZE.unpack_from(data, at)[0]
        if at > len(data):
            raise _short(start, at, data)
        values.append(data[start:at].decode("utf-8"))
    return values, at


def _unpack(form: str, data: mmap.mmap, at: int) -> tuple[Any, ...]:
    end = at + struct.calcsize(form)
    if end > len(data):
        raise _short(at, end, data)
    return struct.unpack_from(form, data, at)


def _short(at: int, end: int, data: mmap.mmap) -> ValueError:
    return ValueError(f"content at byte {at} ends at byte {end}, but the file has {len(data)}")
