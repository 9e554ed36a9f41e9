"""Memory for parameters: aligned, apart from each other, and what was got ahead is used or given back."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from pjax.models import arena as module
from pjax.models.arena import ALIGNMENT, Arena

FLOAT = np.dtype(np.float32)


def wait(arena: Arena) -> None:
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
    wait(arena)
    touched = {block.ctypes.data for block in arena._touched}
    assert len(touched) == 3
    taken = [arena.empty((1 << 14,), FLOAT) for _ in range(4)]
    assert {array.ctypes.data for array in taken[:3]} == touched
    assert taken[3].ctypes.data not in touched and not arena._touched


def test_no_more_is_touched_than_is_asked_for() -> None:
    arena = Arena(1 << 34)
    arena.expect(5 << 16)
    wait(arena)
    with arena:
        pass
    assert not arena._touched
    before = arena._num_touched
    arena._touch()
    assert arena._num_touched == before


def test_as_much_as_a_checkpoint_may_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()
    monkeypatch.setattr(Arena, "__init__", lambda self, ahead=0: asked.append(ahead))
    (tmp_path / "model.gguf").write_bytes(bytes(1000))
    (tmp_path / "model.safetensors").write_bytes(bytes(300))
    for model in (tmp_path / "model.gguf", str(tmp_path), "owner/name", tmp_path / "nothing"):
        Arena.ahead_of(model)
    assert asked == [6000, 300, 0, 0]
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 2000}))
    Arena.ahead_of(tmp_path / "model.gguf")
    assert asked[-1] == 500


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, pjax.models.arena; sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'gguf')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
