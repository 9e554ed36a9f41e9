"""The programs of a step, compiled for one TPU: memory, and no copy of the pool."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import Mesh, SingleDeviceSharding

from pjax.runner.batch import Bucket
from tests.aot import sample_program
from tests.aot.llama_step import POOL_BYTES, make
from tests.aot.tpu import HBM, chip

DECODE, MIXED = Bucket(True, 64, 64), Bucket(False, 512, 64)


@pytest.mark.parametrize(
    ("generation", "model", "mode", "bucket"),
    [
        ("v5e", "SmolLM2-135M", "scan", DECODE),
        ("v5e", "SmolLM2-135M", "scan", MIXED),
        ("v5e", "rows of 448 numbers", "unroll", MIXED),
        ("v6e", "Llama-3-8B", "scan", DECODE),
        ("v6e", "Llama-3-8B", "scan", MIXED),
    ],
    ids=str,
)
def test_step(generation: str, model: str, mode: str, bucket: Bucket) -> None:
    device = chip(generation)
    step, arguments = make(model, mode, bucket, SingleDeviceSharding(device), "tpu")
    with jax.sharding.use_abstract_mesh(Mesh([device], ("x",)).abstract_mesh):
        memory = step.lower(*arguments).compile().memory_analysis()
    weights = sum(leaf.size * 2 for leaf in arguments[0])
    print(f"\n{generation} {model} {bucket}: weights {weights >> 20} MiB, temporaries {memory.temp_size_in_bytes / 2**20:.1f} MiB")
    # The logits, of all rows in float32, a few times over; nothing of the pool's size.
    assert memory.temp_size_in_bytes < POOL_BYTES / 4
    assert memory.alias_size_in_bytes > 0.99 * POOL_BYTES
    assert memory.argument_size_in_bytes < 1.05 * weights + 1.15 * POOL_BYTES + (16 << 20)
    own_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert memory.argument_size_in_bytes + own_outputs + memory.temp_size_in_bytes < HBM[generation]


@pytest.mark.parametrize(("generation", "vocab_size"), [("v5e", 49152), ("v6e", 128256)])
def test_sampling(generation: str, vocab_size: int) -> None:
    """64 rows, of which some are sampled at a time."""
    device = chip(generation)
    program, arguments = sample_program.make(vocab_size, 64, SingleDeviceSharding(device))
    with jax.sharding.use_abstract_mesh(Mesh([device], ("x",)).abstract_mesh):
        memory = program.lower(*arguments).compile().memory_analysis()
    print(f"\n{generation} {vocab_size} tokens: temporaries {memory.temp_size_in_bytes / 2**20:.1f} MiB")
    assert memory.temp_size_in_bytes < 4 * 64 * vocab_size * 4, "a few arrays of the size of the logits"
    assert memory.alias_size_in_bytes == 64 * sample_program.MAX_LEN * 4, "the token table is updated in place"
