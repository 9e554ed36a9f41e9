"""Messages between hosts: a head of JSON and arrays of numbers. Reading one runs nothing: no pickle."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]

_SIZE = struct.Struct("<I")
_KINDS = "iuf"  # whole numbers and floats: what arrays may hold


def encode(kind: str, head: Mapping[str, Any] | None = None, arrays: Arrays | None = None) -> bytes:
    """A message. Empty arrays are left out; `decode` gives whoever asks for one of them None."""
    parts = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items() if array.size}
    shapes = {name: [array.dtype.str, *array.shape] for name, array in parts.items()}
    text = json.dumps({"kind": kind, "head": dict(head or {}), "arrays": shapes}, separators=(",", ":")).encode()
    return b"".join((_SIZE.pack(len(text)), text, *(array.tobytes() for array in parts.values())))


def decode(data: bytes) -> tuple[str, dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Kind, head and arrays of a message. ValueError when it is none."""
    try:
        (size,) = _SIZE.unpack_from(data)
        found = json.loads(data[_SIZE.size : _SIZE.size + size])
        kind, head, shapes = found["kind"], found["head"], found["arrays"]
        arrays, start = {}, _SIZE.size + size
        for name, (dtype, *shape) in shapes.items():
            made = np.dtype(dtype)
            if made.kind not in _KINDS:
                raise ValueError(f"array {name!r} is {dtype}")
            count = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(data, made, count, start).reshape(shape)
            start += count * made.itemsize
    except (struct.error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{len(data)} bytes are no message of pjax: {error}") from error
    return kind, head, arrays
