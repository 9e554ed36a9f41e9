"""The KV write for TPUs (Pallas, Mosaic): read, change and write back aligned groups of rows, several in flight.

A row alone can't be copied to an arbitrary slot: two rows of bfloat16 share a 32-bit sublane.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pjax.pallas_kernels.paged_attention.ragged_batch import RaggedBatch
from pjax.pallas_kernels.pages import check_rows, kv_rows

IN_FLIGHT = 8  # groups in VMEM at once
AHEAD = 4  # groups whose old rows are read ahead


def group_size(page_size: int, dtype: Any) -> int:
    """Rows of a group: of a tile (8 of 4 bytes), and a divisor of the page, so that no group reaches into the next one."""
    return math.gcd(page_size, 32 // jnp.dtype(dtype).itemsize)


def why_not(page_size: int, dtype: Any) -> str | None:
    """The reason why the kernel can't write such pages, or None."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 or bfloat16, but pages are {jnp.dtype(dtype)}"
    if group_size(page_size, dtype) % 8:
        return f"takes pages of a multiple of 8 tokens, but they have {page_size}"
    return None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupTargets:
    """M groups: aligned rows of a page, as few as a copy can move, that one sequence writes some of. Live ones come first.

    No two groups are the same rows, so that they can be in flight together.
    """

    pages: jax.Array  # int32 [M]
    offsets: jax.Array  # int32 [M], of the group's first row in its page
    firsts: jax.Array  # int32 [M], the first row of the group that is written
    counts: jax.Array  # int32 [M], rows that are written; 0 for a group that is not live
    tokens: jax.Array  # int32 [M, R], packed token of each row (those that are not written are in range too); [M, 1]: one for all
    size: int = field(metadata={"static": True})  # R
    num_tokens: int = field(metadata={"static": True})  # T

    @classmethod
    def of(cls, batch: RaggedBatch, num_tokens: int, *, page_size: int, dtype: Any) -> GroupTargets:
        """Groups of the tokens that the batch's rows own. M is at most T, and ceil(T / R) + 2·S."""
        size = group_size(page_size, dtype)
        num_rows = batch.num_rows
        most = min(num_tokens, -(-num_tokens // size) + 2 * num_rows)
        lens = batch.kv_lens
        counts = batch.row_starts[1:] - batch.row_starts[:-1]
        begins = lens - counts  # position of a row's first token
        num_groups = jnp.where(counts > 0, (lens - 1) // size - begins // size + 1, 0)
        ends = jnp.cumsum(num_groups).astype(jnp.int32)
        index = jnp.arange(most, dtype=jnp.int32)
        rows = jnp.minimum(jnp.searchsorted(ends, index, side="right").astype(jnp.int32), num_rows - 1)
        live = index < ends[-1]
        starts = (begins[rows] // size + index - (ends - num_groups)[rows]) * size  # position of the group's first row
        firsts = jnp.maximum(begins[rows] - starts, 0)
        stops = jnp.minimum(lens[rows] - starts, size)
        columns = jnp.clip(starts // page_size, 0, batch.block_tables.shape[1] - 1)
        tokens = batch.row_starts[rows][:, None]
        if not batch.decode_only:  # else a group has one token
            tokens = tokens + (starts - begins[rows])[:, None] + jnp.arange(size, dtype=jnp.int32)
        return cls(
            pages=jnp.where(live, batch.block_tables[rows, columns], 0),
            offsets=starts % page_size,
            firsts=firsts,
            counts=jnp.where(live, stops - firsts, 0),
            tokens=jnp.clip(tokens, 0, num_tokens - 1),
            size=size,
            num_tokens=num_tokens,
        )

    def write(self, pages: jax.Array, keys: jax.Array, values: jax.Array, page_offset: int | jax.Array) -> jax.Array:
        """See `kv_write.WriteTargets`."""
        check_rows(pages, keys, values, self.num_tokens)
        new = kv_rows(keys, values, pages.dtype)[self.tokens]  # [M, R or 1, 2·K·H]
        shifted = replace(self, pages=self.pages + page_offset)
        return _write_groups(shifted, new, pages)


def _write_kernel(
    page_ids: Any,
    offsets: Any,
    firsts: Any,
    counts: Any,
    new: Any,
    pages: Any,
    out: Any,
    buffer: Any,
    reads: Any,
    writes: Any,
    *,
    size: int,
) -> None:
    """One group a grid step. `out` is `pages`; buffer is VMEM [IN_FLIGHT, R, 2·K·H]; reads and writes are semaphores of its slots."""
    del pages
    this, num_groups = pl.program_id(0), pl.num_programs(0)

    def rows(group: Any) -> Any:
        return out.at[page_ids[group], pl.ds(pl.multiple_of(offsets[group], size), size)]

    def read(group: Any) -> Any:
        slot = lax.rem(group, IN_FLIGHT)
        return pltpu.make_async_copy(rows(group), buffer.at[slot], reads.at[slot])

    def write(group: Any) -> Any:
        slot = lax.rem(group, IN_FLIGHT)
        return pltpu.make_async_copy(buffer.at[slot], rows(group), writes.at[slot])

    def start_read(group: Any) -> None:
        @pl.when((group < num_groups) & (counts[jnp.minimum(group, num_groups - 1)] > 0))
        def _() -> None:
            read(group).start()

    def wait_for_write(group: Any) -> None:
        @pl.when((group >= 0) & (counts[jnp.maximum(group, 0)] > 0))
        def _() -> None:
            write(group).wait()

    @pl.when(this == 0)
    def _() -> None:
        for group in range(AHEAD):
            start_read(jnp.int32(group))

    wait_for_write(this + AHEAD - IN_FLIGHT)  # whose slot the next read takes
    start_read(this + AHEAD)

    @pl.when(counts[this] > 0)
    def _() -> None:
        slot = lax.rem(this, IN_FLIGHT)
        read(this).wait()
        row = lax.broadcasted_iota(jnp.int32, buffer.shape[1:], 0)
        mine = (row >= firsts[this]) & (row < firsts[this] + counts[this])
        buffer[slot] = jnp.where(mine, jnp.broadcast_to(new[0], buffer.shape[1:]), buffer[slot])
        write(this).start()

    @pl.when(this == num_groups - 1)
    def _() -> None:
        for back in range(IN_FLIGHT - AHEAD):
            wait_for_write(num_groups - 1 - back)


def _write_groups(targets: GroupTargets, new: jax.Array, pages: jax.Array) -> jax.Array:
    num_groups, num_new, width = new.shape
    return pl.pallas_call(
        functools.partial(_write_kernel, size=targets.size),
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(num_groups,),
            in_specs=[pl.BlockSpec((1, num_new, width), lambda group, *_: (group, 0, 0)), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((IN_FLIGHT, targets.size, width), pages.dtype),
                pltpu.SemaphoreType.DMA((IN_FLIGHT,)),
                pltpu.SemaphoreType.DMA((IN_FLIGHT,)),
            ],
        ),
        input_output_aliases={5: 0},
        name="kv_write",
    )(targets.pages, targets.offsets, targets.firsts, targets.counts, new, pages)
