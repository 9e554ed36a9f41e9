"""Block sizes as data: what was measured is used for its own shape and device, and nothing else is."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from pjax.pallas_kernels.paged_attention import tpu, tuning
from pjax.pallas_kernels.paged_attention.options import AttentionOptions

OPTIONS = AttentionOptions(num_kv_heads=2, scale=1.0)
Q, PAGES = jax.ShapeDtypeStruct((4, 4, 64), jnp.float32), jax.ShapeDtypeStruct((8, 16, 256), jnp.float32)


def block_of(phase: str, pages: Any = PAGES, **given: tpu.Sizes) -> int:
    """What a call would take."""
    return tuning.choose("tpu", tpu.default_sizes, Q, pages, OPTIONS, given)[phase].block


SHAPE = tuning.Shape(dtype="float32", page_size=16, num_heads=4, num_kv_heads=2, head_size=64)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.entries.cache_clear()
    yield tmp_path
    tuning.entries.cache_clear()


def test_what_was_measured_is_used(folder: Path) -> None:
    assert block_of("decode") == 256
    for block in (64, 32):  # a later measurement replaces an earlier one
        tuning.write_entries("cpu", {("tpu", "decode", SHAPE): {"sizes": {"block": block}, "microseconds": 1.0}}, folder)
        assert block_of("decode") == block
    assert block_of("prefill") == 128  # another phase
    assert block_of("decode", jax.ShapeDtypeStruct((8, 8, 256), jnp.float32)) == 256  # another page size
    assert block_of("decode", decode=tpu.Sizes(block=16)) == 16  # the caller's own
    assert len(json.loads((folder / "cpu.json").read_text())["entries"]) == 1


def test_another_kind_of_device_has_its_own(folder: Path) -> None:
    path = tuning.write_entries("TPU v5 lite", {("tpu", "decode", SHAPE): {"sizes": {"block": 64}}}, folder)
    assert path.name == "tpu-v5-lite.json"
    assert block_of("decode") == 256


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"entries": [{"backend": "tpu"}]}', '{"entries": [{"backend": "tpu", "phase": "decode", "shape": {}}]}']
)
def test_a_damaged_file_is_named(folder: Path, text: str) -> None:
    (folder / "cpu.json").write_text(text)
    with pytest.raises(ValueError, match=r"cpu\.json: not a list of tuned sizes"):
        block_of("decode")


def test_an_unknown_size_is_named(folder: Path) -> None:
    tuning.write_entries("cpu", {("tpu", "decode", SHAPE): {"sizes": {"warps": 4}}}, folder)
    with pytest.raises(ValueError, match=r"cpu\.json: sizes of 'tpu' are \['warps'\], but must be of \['block', 'rows'\]"):
        block_of("decode")


@pytest.mark.timeout(120)
def test_the_script_times_and_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, where the figures mean nothing: the fastest of them is what is written, and is used from then on."""
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "scripts")
    script = importlib.import_module("tune_kernels")
    monkeypatch.setattr(tpu, "CANDIDATES", {"decode": {"block": (32, 16)}})
    blocks = iter([3.0, 1.0, 2.0])  # the default, then the candidates

    def seconds(run: object, repeat: int) -> float:
        assert callable(run)
        run().block_until_ready()
        return next(blocks)

    monkeypatch.setattr(script, "seconds", seconds)
    sizes = "--rows 2 --context 40 --chunk 16 --dtype float32 --backend tpu".split()
    monkeypatch.setattr(sys, "argv", ["tune_kernels.py", "4,2,64", *sizes, "--out", str(folder)])
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        script.main()
    (entry,) = json.loads((folder / "cpu.json").read_text())["entries"]
    assert entry["sizes"] == {"block": 32}
    assert entry["microseconds"] == 1e6
    assert entry["default_microseconds"] == 3e6
    assert block_of("decode") == 32
