"""The Triton kernel through the real compiler, for GPUs that are not there: shapes of known models, memory, spills.

`pytest -s` prints the table.
"""

from __future__ import annotations

import functools

import pytest

from tests.aot.gpu import SEES_TRITON, Compiled, compile_in_process
from tests.aot.gpu_shapes import SHAPES, Shape

COMMON = [
    Shape("Llama-3-8B", "mixed"),
    Shape("Llama-3-8B", "mixed", "float32"),
    Shape("Gemma-2-9B", "mixed"),
    Shape("Gemma-2-9B", "mixed", "float32"),
]
ATTENTION = [
    *COMMON,
    *(Shape(model, "mixed") for model in SHAPES if Shape(model, "mixed") not in COMMON),  # a mixed batch takes both kernels
    Shape("Llama-3-8B", "decode"),
    Shape("Llama-3-8B", "mixed", "float16"),
    Shape("Llama-3-8B", "mixed", pool_bytes=8 << 30),
    *(Shape("SmolLM2-135M", "decode", page_size=page_size) for page_size in (8, 128)),
    *(Shape("Llama-3-8B", "mixed", devices=devices) for devices in (4, 8)),
]
WRITES = [Shape("Llama-3-8B", "write"), Shape("Pythia-2.8B", "write"), Shape("Llama-3-8B", "write", devices=8)]


SHAPES_OF = {"a100": ATTENTION, "l40s": COMMON, "h100": ATTENTION, "b200": ATTENTION}


@functools.cache
def compiled(target: str) -> dict[str, Compiled]:
    outcomes = compile_in_process(target, [shape.job for shape in SHAPES_OF[target] + WRITES])
    for outcome in outcomes.values():
        print(f"\n{target:5} {outcome}", end="")
    return outcomes


# (target, shape's name): bytes that ptxas spills there, where it is more than none.
SPILLS = {("b200", "Gemma-7B-mixed-bfloat16-x1-512MiB-G16"): 8}


@pytest.mark.parametrize(
    ("target", "shape"), [pytest.param(target, shape, id=f"{target}-{shape.name}") for target in SHAPES_OF for shape in SHAPES_OF[target]]
)
def test_attention(target: str, shape: Shape) -> None:
    """No spills, no temporary near the pool's size, and the pool takes its own bytes."""
    outcome = compiled(target)[shape.name]
    assert not outcome.error
    if SEES_TRITON:
        assert any(kernel.startswith("paged_decode") for kernel in outcome.registers)
        assert any(kernel.startswith("paged_prefill") for kernel in outcome.registers) == (shape.kind == "mixed")
        assert sum(outcome.spills.values()) == SPILLS.get((target, shape.name), 0)
    assert outcome.temp_bytes < shape.pool_bytes / 8
    assert outcome.argument_bytes < 1.05 * shape.pool_bytes


@pytest.mark.parametrize("shape", WRITES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("target", list(SHAPES_OF))
def test_keys_and_values_are_written_in_place(target: str, shape: Shape) -> None:
    outcome = compiled(target)[shape.name]
    assert not outcome.error
    assert outcome.temp_bytes < shape.pool_bytes / 8
    assert outcome.alias_bytes > 0.95 * shape.pool_bytes
