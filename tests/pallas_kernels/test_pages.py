"""The page pool's memory: large pages, and memory that is got ahead of its use."""

from __future__ import annotations

import ctypes
import re
import time
from mmap import PAGESIZE
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax.pallas_kernels import pages
from pjax.pallas_kernels.pages import new_pool, touching, use_large_pages


def touched_pool() -> jax.Array:
    """32 MiB, every second page written, and large pages asked for then."""
    pool = jax.jit(lambda: new_pool((64, 16, 8192), jnp.float32))()
    pool = jax.jit(lambda pool: pool.at[1::2].set(jnp.arange(8192.0)), donate_argnums=0)(pool)
    use_large_pages(pool)
    return pool


def test_large_pages_keep_what_is_written() -> None:
    np.testing.assert_array_equal(touched_pool()[1::2], np.broadcast_to(np.arange(8192, dtype=np.float32), (32, 16, 8192)))


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no large pages to ask for")
def test_large_pages_are_asked_for() -> None:
    pool = touched_pool()
    mapped = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags:(.*?)$", Path("/proc/self/smaps").read_text(), re.MULTILINE | re.DOTALL)
    middle = pool.unsafe_buffer_pointer() + pool.nbytes // 2
    (flags,) = [flags for start, end, flags in mapped if int(start, 16) <= middle < int(end, 16)]
    assert "hg" in flags.split()


def resident_share(pool: jax.Array) -> float:
    """Share of the system's pages inside the pool that have memory."""
    first = -(-pool.unsafe_buffer_pointer() // PAGESIZE) * PAGESIZE
    found = (ctypes.c_ubyte * ((pool.unsafe_buffer_pointer() + pool.nbytes - first) // PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(len(found) * PAGESIZE), found) == 0
    return float(np.mean(np.asarray(found) & 1))


def test_touching_takes_all_memory_and_keeps_what_is_written() -> None:
    # 64 MiB, for which the C library always asks the system: no memory of an earlier array
    pool = jax.jit(lambda: new_pool((64, 16, 16384), jnp.float32))()
    pool = jax.jit(lambda pool: pool.at[3].set(7.0), donate_argnums=0)(pool)
    assert resident_share(pool) < 0.5
    with touching(pool):
        pass
    assert resident_share(pool) == 1
    assert float(pool[3].min()) == float(pool[3].max()) == 7.0


def test_an_exception_ends_touching(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def touch(first: int, size: int) -> None:
        calls.append(size)
        time.sleep(0.01)

    monkeypatch.setattr(pages, "_library_of", lambda pool: SimpleNamespace(PjaxTouch=touch))
    monkeypatch.setattr(pages, "TOUCHED_AT_ONCE", 4096)
    pool = jnp.zeros((8, 16, 8192))
    with pytest.raises(KeyboardInterrupt), touching(pool):
        raise KeyboardInterrupt
    assert len(calls) < pool.nbytes // 4096
    calls.clear()
    small = jnp.zeros((10, 1000))
    with touching(small):
        pass
    assert calls == [4096] * 9 + [40000 - 9 * 4096]
