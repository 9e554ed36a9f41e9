"""Memory for parameters: aligned, apart from each other, and what was got ahead is used or given back."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from pjax.checkpoints import arena as module
from pjax.checkpoints.arena import ALIGNMENT, Arena

FLOAT = np.dtype(np.float32)


def wait() -> None:
    for thread in threading.enumerate():
        if thread.name == "pjax-memory":
            thread.join(10)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 1 << 16)


@pytest.mark.parametrize("ahead", [0, 3 << 16, 9 << 16])
def test_arrays_are_aligned_and_apart(ahead: int) -> None:
    rng = np.random.default_rng(0)
    with Arena(ahead) as arena:
        arrays = [arena.empty((int(size),), FLOAT) for size in rng.integers(0, 20_000, 40)]
        for number, array in enumerate(arrays):
            array[...] = number
    for number, array in enumerate(arrays):
        assert array.ctypes.data % ALIGNMENT == 0 or array.size == 0
        assert (array == number).all()


def test_blocks_that_were_touched_are_taken_first() -> None:
    arena = Arena(3 << 16)
    wait()
    touched = {block.ctypes.data for block in arena._touched}
    assert len(touched) == 3
    taken = [arena.empty((1 << 14,), FLOAT) for _ in range(4)]
    assert {array.ctypes.data for array in taken[:3]} == touched
    assert taken[3].ctypes.data not in touched and not arena._touched


def test_no_more_is_touched_than_is_asked_for() -> None:
    arena = Arena(1 << 30)
    arena.expect([1 << 16] * 5)
    limit = arena._num_touched + 5
    wait()
    assert arena._num_touched <= limit < 1 << 14
    arena.close()
    assert not arena._touched
    assert arena.expect([1]) == 0


def test_arrays_larger_than_a_block_have_memory_of_their_own() -> None:
    arena = Arena(4 << 16)
    wait()
    assert arena.expect([(1 << 16) + 4, 1 << 15, 1 << 16, 1 << 17]) == 2 << 16
    assert len(arena._touched) == 2
    large = arena.empty((1 << 15,), FLOAT)
    assert large.shape == (1 << 15,) and large.ctypes.data % ALIGNMENT == 0
    assert len(arena._touched) == 2


def test_what_is_left_of_a_block_is_for_the_next_though_a_larger_array_comes_between() -> None:
    """A layer's norms beside matrices larger than a block: one block, not one for each, and none less is touched ahead."""
    arena = Arena()
    arena.empty((8,), FLOAT)
    rest = arena._free
    arena.empty((1 << 15,), FLOAT)
    assert arena._free is rest and arena._limit == -1
    assert arena.empty((8,), FLOAT).ctypes.data == rest.ctypes.data


def test_what_is_too_much_is_given_back_and_the_rest_is_told() -> None:
    arena = Arena(7 << 16)
    wait()
    assert arena.expect([1 << 16, 1 << 16, 1]) == 3 << 16
    assert len(arena._touched) == 3
    assert Arena().expect([1 << 16]) == 0


def test_a_block_that_comes_after_the_end_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    started, ended = threading.Event(), threading.Event()

    def slow(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        started.set()
        assert ended.wait(10)
        return np.empty(shape, dtype)

    monkeypatch.setattr(module, "aligned_empty", slow)
    arena = Arena(2 << 16)
    assert started.wait(10)
    arena.close()
    ended.set()
    wait()
    assert (arena._num_touched, len(arena._touched)) == (1, 0)


def test_as_much_as_a_checkpoint_may_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()
    monkeypatch.setattr(Arena, "__init__", lambda self, ahead=0: asked.append(ahead))
    (tmp_path / "model.gguf").write_bytes(bytes(1000))
    (tmp_path / "model.safetensors").write_bytes(bytes(300))
    for model in (tmp_path / "model.gguf", str(tmp_path), "owner/name", tmp_path / "nothing"):
        Arena.ahead_of(model)
    assert asked == [6000, 300, 0, 0]
    monkeypatch.setattr(module, "host_free_bytes", lambda: 2000)
    Arena.ahead_of(tmp_path / "model.gguf")
    (tmp_path / "model-2.safetensors").symlink_to("nowhere")
    Arena.ahead_of(tmp_path)
    assert asked[-2:] == [500, 0]


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, pjax.checkpoints.arena; sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'gguf')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
