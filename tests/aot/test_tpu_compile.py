"""The TPU kernels through the real compiler, for chips that are not there: shapes of known models, memory, temporaries."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from pjax.pallas_kernels import RaggedBatch, paged_attention

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
SHAPES = {  # query heads, KV heads, head size
    "SmolLM2-135M": (9, 3, 64),
    "Llama-3-8B": (32, 8, 128),
    "Llama-3-70B": (64, 8, 128),
    "Pythia-2.8B": (32, 32, 80),
    "GPT-NeoX-20B": (64, 64, 96),
    "OPT-6.7B": (32, 32, 128),
    "gpt2-xl": (25, 25, 64),
}
POOL_BYTES = 512 << 20  # a small pool would hide a copy of it
PAGE_SIZE = 16


@functools.cache
def device(generation: str) -> Any:
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]


def compile_attention(generation: str, heads: tuple[int, int, int], dtype: str, *, decode_only: bool) -> Any:
    """Compiled attention of 64 decode rows, or of 256 tokens of 16 rows."""
    chip = device(generation)
    num_heads, num_kv_heads, head_size = heads
    num_tokens, num_rows, width = (64, 64, 128) if decode_only else (256, 16, 128)

    def struct(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(chip))

    row = 2 * num_kv_heads * head_size
    pages = struct((POOL_BYTES // (PAGE_SIZE * row * jnp.dtype(dtype).itemsize), PAGE_SIZE, row), dtype)
    batch = RaggedBatch(struct((num_rows + 1,)), struct((num_rows,)), struct((num_rows, width)), struct(()), decode_only=decode_only)
    call = jax.jit(lambda q, pages, batch: paged_attention(q, pages, batch, num_kv_heads=num_kv_heads, backend="tpu"))
    with jax.sharding.use_abstract_mesh(Mesh(np.array([chip]), ("x",)).abstract_mesh):
        return call.lower(struct((num_tokens, num_heads, head_size), dtype), pages, batch).compile()


@pytest.mark.parametrize("decode_only", [True, False], ids=["decode", "mixed"])
@pytest.mark.parametrize("model", list(SHAPES))
@pytest.mark.parametrize(("generation", "dtype"), [("v5e", "bfloat16"), ("v6e", "bfloat16")])
def test_every_model_on_the_common_chips(generation: str, model: str, dtype: str, decode_only: bool) -> None:
    check(compile_attention(generation, SHAPES[model], dtype, decode_only=decode_only))


@pytest.mark.parametrize("decode_only", [True, False], ids=["decode", "mixed"])
@pytest.mark.parametrize("generation", list(TOPOLOGIES))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_chip(generation: str, dtype: str, decode_only: bool) -> None:
    check(compile_attention(generation, SHAPES["SmolLM2-135M"], dtype, decode_only=decode_only))


def check(compiled: Any) -> None:
    """No temporary near the pool's size, and the pool takes its own bytes: rows are not padded on the chip."""
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < POOL_BYTES / 8
    assert memory.argument_size_in_bytes < 1.05 * POOL_BYTES
