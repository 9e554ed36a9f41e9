"""The Triton kernel through the real compiler, for GPUs that are not there: shapes of known models, memory, spills.

`pytest -s` prints the table.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pjax.pallas_kernels import RaggedBatch, paged_attention, write_kv
from tests.aot.gpu import Compiled, Job, compile_in_process

SHAPES = {  # query heads, KV heads, head size
    "SmolLM2-135M": (9, 3, 64),
    "Llama-3-8B": (32, 8, 128),
    "Llama-3-70B": (64, 8, 128),
    "Pythia-2.8B": (32, 32, 80),
    "GPT-NeoX-20B": (64, 64, 96),
    "OPT-6.7B": (32, 32, 128),
    "gpt2-xl": (25, 25, 64),
    "Gemma-7B": (16, 16, 256),
    "Gemma-2-9B": (16, 8, 256),
    "Falcon-7B": (71, 1, 64),
}
OPTIONS = {"Gemma-2-9B": {"sliding_window": 4096, "logit_softcap": 50.0}}
POOL_BYTES = 512 << 20  # a small pool would hide a copy of it


@dataclass(frozen=True)
class Shape:
    """What one job compiles; `name` is what a test is called."""

    model: str
    kind: str  # decode, mixed or write
    dtype: str = "bfloat16"
    devices: int = 1  # KV heads are sharded over them
    pool_bytes: int = POOL_BYTES  # of one device; offsets into more than 4 GiB take 64 bits
    page_size: int = 16

    @property
    def name(self) -> str:
        return f"{self.model}-{self.kind}-{self.dtype}-x{self.devices}-{self.pool_bytes >> 20}MiB-G{self.page_size}"

    @property
    def job(self) -> Job:
        return Job(self.name, "tests.aot.test_triton_compile:build", dataclasses.asdict(self))


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


def build(all_devices: Any, **fields: Any) -> tuple[Any, tuple[Any, ...]]:
    """Attention of 64 decode rows, or of 256 tokens of 16 rows; or a write of as many tokens into the donated pool."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    shape = Shape(**fields)
    num_heads, num_kv_heads, head_size = SHAPES[shape.model]
    mesh = Mesh(np.array(all_devices[: shape.devices]), ("tp",))
    num_tokens, num_rows, width = (64, 64, 128) if shape.kind == "decode" else (256, 16, 128)
    local = num_kv_heads // shape.devices
    row = 2 * local * head_size
    heads, rows, whole = PartitionSpec(None, "tp"), PartitionSpec(None, None, "tp"), PartitionSpec()

    def struct(sizes: tuple[int, ...], spec: PartitionSpec = whole, of: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, of, sharding=NamedSharding(mesh, spec))

    dtype = jnp.dtype(shape.dtype)
    num_pages = shape.pool_bytes // (shape.page_size * row * dtype.itemsize)
    pages = struct((num_pages, shape.page_size, row * shape.devices), rows, dtype)
    if shape.kind == "write":
        own = struct((num_tokens, num_kv_heads, head_size), heads, dtype)
        write = jax.shard_map(write_kv, mesh=mesh, in_specs=(rows, heads, heads, whole), out_specs=rows, check_vma=False)
        return jax.jit(write, donate_argnums=0), (pages, own, own, struct((num_tokens,)))
    batch = RaggedBatch(
        struct((num_rows + 1,)), struct((num_rows,)), struct((num_rows, width)), struct(()), decode_only=shape.kind == "decode"
    )
    attend = functools.partial(paged_attention, num_kv_heads=local, backend="triton", **OPTIONS.get(shape.model, {}))
    call = jax.shard_map(attend, mesh=mesh, in_specs=(heads, rows, whole), out_specs=heads, check_vma=False)
    return jax.jit(call), (struct((num_tokens, num_heads, head_size), heads, dtype), pages, batch)


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
