"""Compiling for TPUs that are not there."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from pjax.pallas_kernels import RaggedBatch, paged_attention

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
HBM = {"v4": 32 << 30, "v5e": 16 << 30, "v5p": 95 << 30, "v6e": 32 << 30, "7x": 192 << 30}
POOL_BYTES = 512 << 20  # a small pool would hide a copy of it


@functools.cache
def chip(generation: str) -> Any:
    """One device of a generation."""
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]


@functools.cache
def mesh_of(topology: str) -> Mesh:
    """All devices of a topology as one axis "model"."""
    return Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices), ("model",))


def compile_for(where: Any, function: Any, *args: Any, donate: Any = ()) -> Any:
    """Compiled for a device, or for a mesh when the arguments' structs have shardings of it.

    Args:
      where: from `chip` or `mesh_of`.
      args: structs; those without a sharding are placed whole.
    """
    mesh = where if isinstance(where, Mesh) else Mesh(np.array([where]), ("x",))
    whole = NamedSharding(mesh, PartitionSpec()) if isinstance(where, Mesh) else SingleDeviceSharding(where)

    def placed(struct: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = struct.sharding or whole
        # Whole tables and pools as they are indexed: XLA may choose another order for an argument of its own accord.
        order = Format(Layout(major_to_minor=tuple(range(len(struct.shape)))), sharding)
        return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=order)  # type: ignore[arg-type]

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, donate_argnums=donate).lower(*jax.tree.map(placed, args)).compile()


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    """int32 of a shape."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def batch_struct(num_rows: int, width: int, *, decode_only: bool) -> RaggedBatch:
    """Structs of a batch."""
    fields: tuple[Any, ...] = (ints(num_rows + 1), ints(num_rows), ints(num_rows, width), ints())
    return RaggedBatch(*fields, decode_only=decode_only)


def pool_struct(heads: tuple[int, int, int], dtype: str, page_size: int, sharding: Any = None) -> jax.ShapeDtypeStruct:
    """A pool of POOL_BYTES, about."""
    row = 2 * heads[1] * heads[2]
    num_pages = POOL_BYTES // (page_size * row * jnp.dtype(dtype).itemsize)
    return jax.ShapeDtypeStruct((num_pages, page_size, row), dtype, sharding=sharding)


def compile_attention(
    generation: str,
    heads: tuple[int, int, int],
    dtype: str,
    *,
    decode_only: bool,
    page_size: int = 16,
    width: int = 128,
    **options: Any,
) -> Any:
    """Compiled attention of 64 decode rows, or of 256 tokens of 16 rows."""
    num_tokens, num_rows = (64, 64) if decode_only else (256, 16)
    return compile_for(
        chip(generation),
        lambda q, pages, batch: paged_attention(q, pages, batch, num_kv_heads=heads[1], backend="tpu", **options),
        jax.ShapeDtypeStruct((num_tokens, heads[0], heads[2]), dtype),
        pool_struct(heads, dtype, page_size),
        batch_struct(num_rows, width, decode_only=decode_only),
    )


def check_memory(compiled: Any, *, padding: float = 1.0) -> None:
    """No temporary near the pool's size, and the pool takes its own bytes (times `padding`): rows are dense on the chip."""
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < POOL_BYTES / 8
    assert memory.argument_size_in_bytes < 1.05 * padding * POOL_BYTES
