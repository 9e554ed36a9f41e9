"""Memory of the parameters. Nothing heavy is imported here: it can be got while JAX is being imported."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from pjax.checkpoints.gguf_parts import parts_of
from pjax.machine import expand_user, host_free_bytes

ALIGNMENT = 64
BLOCK = 64 << 20  # bytes of memory that parameters share
EXPANSION = {".gguf": 6}  # float32 parameters of Q4_1 and Q5 take about so many times a file's size; others want less, or get less ahead


def aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """Uninitialised memory that a CPU device takes over without a copy: XLA asks for 64-byte alignment."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


class Arena:
    """Parameters side by side in large blocks, which the system backs with large pages: a CPU streams weights faster from them.

    A block lives as long as any array in it. A context manager: leaving it closes it.

    Args:
      ahead: bytes, in whole blocks, that a thread gets and touches meanwhile. The first touch of memory costs more than what is
        written there later: 1.2 s for 512 MB where a virtual machine's host has to find it, 0.2 s where it was in use before.
    """

    def __init__(self, ahead: int = 0) -> None:
        self._free = np.empty(0, np.uint8)
        self._touched: deque[np.ndarray] = deque()
        self._limit = ahead // BLOCK  # blocks that the thread is to touch; it alone writes the next
        self._num_touched = 0
        self._closed = False
        if self._limit:
            threading.Thread(target=self._touch, name="pjax-memory", daemon=True).start()

    @classmethod
    def ahead_of(cls, model: str | Path) -> Arena:
        """For the weights of a local checkpoint, as large as its files let expect; a quarter of the free memory at most."""
        path = expand_user(model)
        files = parts_of(path) if path.is_file() else list(path.glob("model*.safetensors")) or list(path.glob("pytorch_model*.bin"))
        try:
            wanted = sum(file.stat().st_size * EXPANSION.get(file.suffix, 1) for file in files)
        except OSError:  # whoever opens it says what is wrong
            return cls()
        return cls(min(wanted, host_free_bytes() // 4))

    def _touch(self) -> None:
        while self._num_touched < self._limit:
            self._num_touched += 1
            try:
                block = aligned_empty((BLOCK,), np.dtype(np.uint8))
            except MemoryError:
                return
            block.fill(0)  # without the interpreter's lock
            self._touched.append(block)
        if self._closed:  # meanwhile
            self._touched.clear()

    def expect(self, sizes: Iterable[int]) -> int:
        """Arrays of so many bytes will be asked for: no more is touched ahead than they take of blocks, and what is too much is given back.

        Returns how many bytes are there for them already.
        """
        if self._closed:
            return 0
        blocks = -(-sum(size for size in sizes if size <= BLOCK) // BLOCK)
        self._limit = min(self._limit, blocks)
        while len(self._touched) > blocks:
            self._touched.pop()
        return min(self._num_touched, blocks) * BLOCK

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is touched from here on, and what nobody took is given back."""
        self._limit, self._closed = 0, True
        self._touched.clear()

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        """As `aligned_empty`. For one thread."""
        size = math.prod(shape) * dtype.itemsize
        if size > BLOCK:  # memory of its own: what is left of the block is for those that come after it
            return aligned_empty(shape, dtype)
        if size > len(self._free):
            if self._touched:
                self._free = self._touched.popleft()
            else:
                self._limit -= 1
                self._free = aligned_empty((BLOCK,), np.dtype(np.uint8))
        taken, self._free = self._free[:size], self._free[-(-size // ALIGNMENT) * ALIGNMENT :]
        return taken.view(dtype).reshape(shape)
