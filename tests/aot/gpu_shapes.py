"""What the tests of GPU kernels compile: attention and writes in the shapes of known models."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pjax.pallas_kernels import RaggedBatch, write_kv
from pjax.pallas_kernels.paged_attention.options import AttentionOptions
from pjax.pallas_kernels.paged_attention.tuning import MODELS
from tests.aot.gpu import Job

SHAPES = MODELS | {"Gemma-7B": (16, 16, 256), "Gemma-2-9B": (16, 8, 256), "Falcon-7B": (71, 1, 64)}
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
    backend: str = "triton"

    @property
    def name(self) -> str:
        return f"{self.model}-{self.kind}-{self.dtype}-x{self.devices}-{self.pool_bytes >> 20}MiB-G{self.page_size}"

    @property
    def job(self) -> Job:
        return Job(self.name, "tests.aot.gpu_shapes:build", dataclasses.asdict(self))


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
    options = AttentionOptions(**{"num_kv_heads": local, "scale": head_size**-0.5} | OPTIONS.get(shape.model, {}))
    module = importlib.import_module(f"pjax.pallas_kernels.paged_attention.{shape.backend}")  # `api` would ask this machine's device
    attend = functools.partial(module.attend, options=options)
    call = jax.shard_map(attend, mesh=mesh, in_specs=(heads, rows, whole), out_specs=heads, check_vma=False)
    return jax.jit(call), (struct((num_tokens, num_heads, head_size), heads, dtype), pages, batch)
