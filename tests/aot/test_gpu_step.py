"""The programs of a step, compiled for one GPU: no copy of the pool, no spills in pjax's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pjax.runner.batch import Bucket
from tests.aot import sample_program
from tests.aot.gpu import Job, compile_in_process
from tests.aot.llama_step import POOL_BYTES, make


def build(devices: Any, decode_only: bool) -> Any:
    """SmolLM2-135M: 64 decode rows, or 512 tokens of 64 rows."""
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    return make("SmolLM2-135M", "scan", Bucket(decode_only, 64 if decode_only else 512, 64), sharding, "triton")


def build_sample(devices: Any) -> Any:
    """64 rows of SmolLM2-135M's vocabulary."""
    return sample_program.make(49152, 64, NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec()))


@pytest.mark.parametrize("target", ["a100", "h100"])
def test_step(target: str) -> None:
    jobs = [Job(name, "tests.aot.test_gpu_step:build", {"decode_only": name == "decode"}) for name in ("decode", "mixed")]
    for outcome in compile_in_process(target, jobs).values():
        print(f"\n{target} {outcome}", end="")
        assert not outcome.error
        assert outcome.temp_bytes < POOL_BYTES / 4
        assert outcome.alias_bytes > 0.99 * POOL_BYTES
        assert not any(spilled for kernel, spilled in outcome.spills.items() if kernel.startswith("paged"))


@pytest.mark.parametrize("target", ["a100", "h100"])
def test_sampling(target: str) -> None:
    (outcome,) = compile_in_process(target, [Job("sample", "tests.aot.test_gpu_step:build_sample")]).values()
    print(f"\n{target} {outcome}", end="")
    assert not outcome.error
    assert outcome.temp_bytes < 4 * 64 * 49152 * 4, "a few arrays of the size of the logits"
    assert outcome.alias_bytes == 64 * sample_program.MAX_LEN * 4, "the token table is updated in place"
