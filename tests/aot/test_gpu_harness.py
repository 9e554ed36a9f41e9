"""That the harness for GPUs sees what it is there to see: spills, a refusal, a crash of the compiler."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.aot.gpu import SEES_TRITON, Job, compile_in_process


def square(devices: Any, size: int, *, abort: bool = False) -> Any:
    """A product [size, size]² held in the registers of one warp."""
    if abort:
        os.abort()
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())

    def kernel(x: Any, out: Any) -> None:
        out[...] = pltriton.dot(x[...], x[...])

    def call(x: jax.Array) -> jax.Array:
        params = pltriton.CompilerParams(num_warps=1, num_stages=1)
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32), compiler_params=params, name="square")(x)

    return jax.jit(call), (jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=sharding),)


def test_it_sees_spills_and_refusals_and_survives_a_crash() -> None:
    build = "tests.aot.test_gpu_harness:square"
    jobs = [
        Job("small", build, {"size": 16}),
        Job("aborts", build, {"size": 16, "abort": True}),
        Job("spills", build, {"size": 128}),
        Job("refused", build, {"size": 24}),
    ]
    outcomes = compile_in_process("h100", jobs)
    assert list(outcomes) == [job.name for job in jobs]
    assert outcomes["small"].argument_bytes == 16 * 16 * 2
    assert "exit status -6" in outcomes["aborts"].error
    if SEES_TRITON:
        assert outcomes["small"].spills == {"square": 0}
        assert 0 < outcomes["small"].registers["square"] <= 255
        assert outcomes["spills"].spills["square"] > 0
    assert "power of 2" in outcomes["refused"].error
