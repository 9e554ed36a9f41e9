"""The Hopper kernel through the real compiler, for GPUs that are not there: shapes of known models, memory, spills.

`pytest -s` prints the table.
"""

from __future__ import annotations

import functools

import pytest

from tests.aot.gpu import Compiled, compile_in_process
from tests.aot.gpu_shapes import SHAPES, Shape

KINDS = ("decode", "mixed")
SHAPE = functools.partial(Shape, backend="mosaic_gpu")
ATTENTION = [
    *(SHAPE(model, kind) for model in SHAPES for kind in KINDS),
    SHAPE("Llama-3-8B", "mixed", "float16"),
    SHAPE("Llama-3-8B", "decode", pool_bytes=8 << 30),
    *(SHAPE("Llama-3-8B", kind, devices=devices) for kind in KINDS for devices in (4, 8)),
    *(SHAPE("SmolLM2-135M", "mixed", page_size=page_size) for page_size in (8, 32, 64, 128)),
    *(SHAPE("Pythia-2.8B", "mixed", page_size=page_size) for page_size in (8, 128)),
]
REFUSED = SHAPE("Llama-3-8B", "decode")


@functools.cache
def compiled(target: str) -> dict[str, Compiled]:
    outcomes = compile_in_process(target, [shape.job for shape in (ATTENTION if target == "h100" else [REFUSED])])
    for outcome in outcomes.values():
        print(f"\n{target:5} {outcome}", end="")
    return outcomes


@pytest.mark.parametrize("shape", ATTENTION, ids=lambda shape: shape.name)
def test_attention(shape: Shape) -> None:
    """No spills, no temporary near the pool's size, and the pool takes its own bytes."""
    outcome = compiled("h100")[shape.name]
    assert not outcome.error
    assert any(kernel.startswith("paged_decode") for kernel in outcome.registers)
    assert any(kernel.startswith("paged_prefill") for kernel in outcome.registers) == (shape.kind == "mixed")
    assert sum(outcome.spills.values()) == 0
    assert outcome.temp_bytes < shape.pool_bytes / 8
    assert outcome.argument_bytes < 1.05 * shape.pool_bytes


@pytest.mark.parametrize("target", ["a100", "b200"])
def test_other_generations_have_no_wgmma(target: str) -> None:
    """The compiler refuses; `why_not` does so first, and gives the reason (see the kernel's other tests)."""
    assert "Pass pipeline failed" in compiled(target)[REFUSED.name].error
