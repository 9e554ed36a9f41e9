"""Memory of the parameters. Nothing heavy is imported here: it can be got while JAX is being imported."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

ALIGNMENT = 64
BLOCK = 64 << 20  # bytes of memory that parameters share
EXPANSION = {".gguf": 6}  # parameters take at most about so many times a file's size


def aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """Uninitialised memory that a CPU device takes over without a copy: XLA asks for 64-byte alignment."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


class Arena:
    """Parameters side by side in large blocks, which the system backs with large pages: a CPU streams weights faster from them.

    A block lives as long as any array in it. A context manager: leaving it ends what is done ahead, and gives back what nobody took.

    Args:
      ahead: bytes, in whole blocks, that a thread gets and touches meanwhile. The first touch of memory costs more than what is
        written there later: 1.2 s for 512 MB where a virtual machine's host has to find it, 0.2 s where it was in use before.
    """

    def __init__(self, ahead: int = 0) -> None:
        self._free = np.empty(0, np.uint8)
        self._touched: deque[np.ndarray] = deque()
        self._limit = ahead // BLOCK  # blocks that the thread is to touch; it alone writes the next
        self._num_touched = 0
        if self._limit:
            threading.Thread(target=self._touch, name="pjax-memory", daemon=True).start()

    @classmethod
    def ahead_of(cls, model: str | Path) -> Arena:
        """For the weights of a local checkpoint, as large as its files let expect; a quarter of the free memory at most."""
        import psutil

        path = Path(model).expanduser()
        files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]
        wanted = sum(file.stat().st_size * EXPANSION.get(file.suffix, 1) for file in files)
        return cls(min(wanted, psutil.virtual_memory().available // 4))

    def _touch(self) -> None:
        while self._num_touched < self._limit:
            self._num_touched += 1
            block = aligned_empty((BLOCK,), np.dtype(np.uint8))
            block.fill(0)  # without the interpreter's lock
            self._touched.append(block)

    def expect(self, num_bytes: int) -> None:
        """So much will be asked for in all: no more is touched ahead."""
        self._limit = min(self._limit, -(-num_bytes // BLOCK))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._limit = 0
        self._touched.clear()

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        """As `aligned_empty`. For one thread."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._free):
            if size <= BLOCK and self._touched:
                self._free = self._touched.popleft()
            else:
                self._limit -= 1
                self._free = aligned_empty((max(size, BLOCK),), np.dtype(np.uint8))
        taken, self._free = self._free[:size], self._free[-(-size // ALIGNMENT) * ALIGNMENT :]
        return taken.view(dtype).reshape(shape)
