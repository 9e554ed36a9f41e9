"""Paged attention for TPUs (Pallas, Mosaic): decode rows and tiles of prefill queries, each in the form that suits it.

Both stream blocks of pages from HBM into VMEM, two blocks in flight, by DMAs that the scalar-prefetched block table
drives; only live pages are copied. Flash accumulation in float32 (Dao et al. 2022, algorithm 1).

Decode spreads the query of each KV head over its own lanes of a key row, zeros elsewhere: one product with the whole row
scores all heads, and no head is sliced out of a row whose lanes are not aligned. Prefill has enough rows to pay for a
product per head; each head reads an aligned lane window around its own lanes, with the query placed to match.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pjax.pallas_kernels.paged_attention.options import AttentionOptions
from pjax.pallas_kernels.paged_attention.ragged_batch import RaggedBatch
from pjax.pallas_kernels.paged_attention.tiles import Tiles
from pjax.pallas_kernels.paged_attention.tuning import choose

LANES = 128
BUFFER_BYTES = 4 << 20  # of VMEM for two blocks of pages
MAX_PAGE_BYTES = 3 << 20  # two of them and what else a kernel needs fit 16 MiB of VMEM
PREFILL_BYTES = 6 << 20  # of VMEM for all that grows with them
MASKED = -1e30  # finite, so that a fully masked block gives no NaN


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What may be tuned; cut to what the page size and VMEM allow."""

    block: int  # tokens of KV that one step of the inner loop takes
    rows: int = 128  # query rows of a prefill tile and KV head


CANDIDATES = {"decode": {"block": (128, 256, 512)}, "prefill": {"block": (128, 256), "rows": (64, 128, 256)}}


def default_sizes(q: jax.Array, pages: jax.Array, options: AttentionOptions, phase: str) -> Sizes:
    """By the compiler's schedules: in decode 256 tokens beat 128 by a tenth to a third where a token's row is short."""
    short = phase == "decode" and pages.shape[2] * pages.dtype.itemsize <= 4096
    return Sizes(block=256 if short else 128)


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """What a kernel needs to know when it is traced."""

    options: AttentionOptions
    ratio: int  # R = N / K
    head_size: int  # H
    page_size: int  # G
    pages_per_block: int
    tile_rows: int  # of a prefill tile and KV head, at most
    exact: bool  # float32 products in full precision

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.options.num_kv_heads

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.pages_per_block * self.page_size

    @property
    def precision(self) -> lax.Precision | None:
        return lax.Precision.HIGHEST if self.exact else None

    @property
    def keys(self) -> tuple[int, int]:
        """Aligned lanes [start, stop) of a row that hold all keys."""
        return 0, _up(self.num_kv_heads * self.head_size)

    @property
    def values(self) -> tuple[int, int]:
        """Aligned lanes [start, stop) of a row that hold all values."""
        width = self.num_kv_heads * self.head_size
        return width // LANES * LANES, 2 * width

    def window(self, first: int) -> tuple[int, int]:
        """Aligned lanes [start, stop) around one head's lanes [first, first + H)."""
        return first // LANES * LANES, min(_up(first + self.head_size), 2 * self.num_kv_heads * self.head_size)


def _up(lanes: int) -> int:
    return -(-lanes // LANES) * LANES


def why_not(q: jax.Array, pages: jax.Array, options: AttentionOptions) -> str | None:
    """The reason why the kernels can't be used for these arguments, or None."""
    if reason := options.why_not_numbers():
        return reason
    if q.dtype != pages.dtype or q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 or bfloat16, the same for both, but q is {q.dtype} and pages are {pages.dtype}"
    _, page_size, width = pages.shape
    if page_size % 8 or page_size * width * pages.dtype.itemsize > MAX_PAGE_BYTES:
        return (
            f"takes pages of a multiple of 8 tokens and up to {MAX_PAGE_BYTES} bytes (VMEM), but they have {page_size} tokens and "
            f"{page_size * width * pages.dtype.itemsize} bytes"
        )
    if width < LANES:
        return f"takes rows of at least {LANES} numbers, but pages have 2·K·H = {width}"
    return None


def attend(
    q: jax.Array, pages: jax.Array, batch: RaggedBatch, options: AttentionOptions, sizes: Mapping[str, Sizes] | None = None
) -> jax.Array:
    """Attention of each packed token over its own sequence's pages. See `paged_attention` for arguments.

    Args:
      sizes: by phase; those that are not given are tuned ones, or the default.
    """
    chosen = choose("tpu", default_sizes, q, pages, options, sizes)
    out = _decode(q, pages, batch, make_spec(q, pages, options, chosen["decode"]))
    return out if batch.decode_only else _prefill(out, q, pages, batch, make_spec(q, pages, options, chosen["prefill"]))


def make_spec(q: jax.Array, pages: jax.Array, options: AttentionOptions, sizes: Sizes) -> _Spec:
    """What a kernel is traced with."""
    _, page_size, width = pages.shape
    fits = BUFFER_BYTES // (2 * width * pages.dtype.itemsize)
    return _Spec(
        options=options,
        ratio=q.shape[1] // options.num_kv_heads,
        head_size=q.shape[2],
        page_size=page_size,
        pages_per_block=max(min(sizes.block, fits) // page_size, 1),
        tile_rows=sizes.rows,
        exact=q.dtype == jnp.float32,
    )


# ---- what both kernels share


class _Span(NamedTuple):
    """The work of one grid step: tokens [first, stop) of its row of the block table; none when stop is 0."""

    first: Any
    stop: Any


class _Refs(NamedTuple):
    """What both kernels get after their own scalars."""

    table: Any  # SMEM [1, 1, W]: the block table's row of this grid step
    next_table: Any  # and of the next
    q: Any
    pages: Any  # the pool in HBM
    out: Any
    buffer: Any  # VMEM [2, block, 2·K·H]
    acc: Any  # float32 [..., rows, lanes of values]
    top: Any  # float32 [..., rows, 128], equal lanes
    total: Any
    turn: Any  # SMEM [1]: the slot of this grid step's first block
    semaphores: Any  # DMA [2]


def _scratch(rows: tuple[int, ...], lanes: int, pages: jax.Array, spec: _Spec) -> list[Any]:
    """Shapes of the scratch memory behind the last six of `_Refs`, for an accumulator of `rows` and lanes."""
    return [
        pltpu.VMEM((2, spec.block, pages.shape[-1]), pages.dtype),
        pltpu.VMEM((*rows, lanes), jnp.float32),
        pltpu.VMEM((*rows, LANES), jnp.float32),
        pltpu.VMEM((*rows, LANES), jnp.float32),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
    ]


@dataclass(frozen=True)
class _Stream:
    """Copies the blocks of each grid step's span from HBM, one ahead of their use.

    The last block of a grid step copies the first one of the next, so that no step but the first waits for a whole
    copy. Grid steps with work come before those without, in one order on one core.
    """

    refs: _Refs
    spec: _Spec

    def run(self, spans: Callable[[Any], _Span], step: Callable[[Any, Any], None]) -> None:
        """Calls `step(block index, slot of the buffer)` for this grid step's blocks; `spans(i)` is the span of grid step i."""
        spec, this = self.spec, pl.program_id(0)
        span, after = spans(this), spans(jnp.minimum(this + 1, pl.num_programs(0) - 1))
        more = (this + 1 < pl.num_programs(0)) & (after.stop > 0)
        first_block, num_blocks = span.first // spec.block, pl.cdiv(span.stop, spec.block)

        @pl.when(this == 0)
        def _() -> None:
            self.refs.turn[0] = 0

            @pl.when(span.stop > 0)
            def _() -> None:
                self.start(span, first_block, 0, lambda column: self.refs.table[0, 0, column])

        turned = self.refs.turn[0]

        @pl.loop(first_block, num_blocks)
        def _(index: Any) -> None:
            slot = lax.rem(index - first_block + turned, 2)
            last = index + 1 == num_blocks

            @pl.when(~last | more)
            def _() -> None:
                self.start(
                    _Span(*(jnp.where(last, b, a) for a, b in zip(span, after, strict=True))),
                    jnp.where(last, after.first // spec.block, index + 1),
                    1 - slot,
                    lambda column: jnp.where(last, self.refs.next_table[0, 0, column], self.refs.table[0, 0, column]),
                )

            self.wait(span, index, slot)
            step(index, slot)

        self.refs.turn[0] = lax.rem(turned + num_blocks - first_block, 2)

    def live(self, span: _Span, index: Any) -> tuple[Any, Any]:
        """Pages [low, high) of block `index` that hold tokens of the span."""
        begin, size = index * self.spec.pages_per_block, self.spec.page_size
        return jnp.maximum(span.first // size, begin), jnp.minimum(pl.cdiv(span.stop, size), begin + self.spec.pages_per_block)

    def start(self, span: _Span, index: Any, slot: Any, page_id: Callable[[Any], Any]) -> None:
        """Starts to copy the live pages of a block; `page_id(column)` reads the block table."""
        spec, (low, high) = self.spec, self.live(span, index)
        for j in range(spec.pages_per_block):
            column = index * spec.pages_per_block + j

            @pl.when((column >= low) & (column < high))
            def _(column: Any = column, j: int = j) -> None:
                target = self.refs.buffer.at[slot, pl.ds(j * spec.page_size, spec.page_size)]
                pltpu.make_async_copy(self.refs.pages.at[page_id(column)], target, self.refs.semaphores.at[slot]).start()

    def wait(self, span: _Span, index: Any, slot: Any) -> None:
        """Waits for all copies of a block at once: a wait counts bytes."""
        low, high = self.live(span, index)
        num_tokens = pl.multiple_of((high - low) * self.spec.page_size, self.spec.page_size)
        copied = self.refs.buffer.at[slot, pl.ds(0, num_tokens)]
        pltpu.make_async_copy(copied, copied, self.refs.semaphores.at[slot]).wait()


def _table_specs(num_steps: int, width: int, row: Callable[..., Any]) -> list[pl.BlockSpec]:
    """Rows of the block table [S, 1, W] for this grid step and the next, one each: whole tables outgrow SMEM (1 MiB)."""

    def at(ahead: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, 1, width), lambda step, *args: (row(jnp.minimum(step + ahead, num_steps - 1), *args), 0, 0), memory_space=pltpu.SMEM
        )

    return [at(0), at(1)]


def _live_values(values: Any, index: Any, first: Any, stop: Any, spec: _Spec) -> Any:
    """Zeros where no live token is: such a slot may hold NaN, and 0 · NaN is NaN."""
    positions = index * spec.block + lax.broadcasted_iota(jnp.int32, values.shape, 0)
    return jnp.where((positions >= first) & (positions < stop), values, jnp.zeros_like(values))


def _scores(q: Any, keys: Any, visible: Any, spec: _Spec) -> Any:
    """float32 [rows, block]: scaled, capped and masked."""
    scores = lax.dot_general(q, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32, precision=spec.precision)
    scores = scores * spec.options.scale
    if spec.options.logit_softcap is not None:
        scores = spec.options.logit_softcap * jnp.tanh(scores / spec.options.logit_softcap)
    return jnp.where(visible, scores, MASKED)


def _accumulate(scores: Any, values: Any, visible: Any, top: Any, total: Any, acc: Any, spec: _Spec) -> None:
    """One flash step on refs `top`, `total` [rows, 128] (equal lanes) and `acc` [rows, lanes of values]."""
    new_top = jnp.maximum(top[:, :1], scores.max(axis=1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - new_top), 0.0)
    shrink = jnp.exp(top[:, :1] - new_top)
    new_total = total[:, :1] * shrink + weights.sum(axis=1, keepdims=True)
    top[...] = jnp.broadcast_to(new_top, top.shape)
    total[...] = jnp.broadcast_to(new_total, total.shape)
    product = jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32, precision=spec.precision)
    acc[...] = acc[...] * shrink + product


def _clear(top: Any, total: Any, acc: Any) -> None:
    top[...] = jnp.full(top.shape, MASKED, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    acc[...] = jnp.zeros(acc.shape, jnp.float32)


def _first_seen(position: Any, spec: _Spec) -> Any:
    return 0 if spec.options.sliding_window is None else jnp.maximum(position - spec.options.sliding_window + 1, 0)


# ---- decode


def _decode_kernel(lens: Any, *args: Any, spec: _Spec) -> None:
    refs = _Refs(*args)
    q, buffer = refs.q, refs.buffer

    def span(row: Any) -> _Span:
        return _Span(_first_seen(lens[row] - 1, spec), lens[row])

    first, stop = span(pl.program_id(0))
    num_heads, ratio = spec.num_kv_heads * spec.ratio, spec.ratio

    def own_lanes(shape: tuple[int, ...], offset: int, j: int) -> Any:
        """Where head row n = k · R + j meets the lanes of KV head k, which begin at `offset` + k · H."""
        head = lax.broadcasted_iota(jnp.int32, shape, 0)
        lane = lax.broadcasted_iota(jnp.int32, shape, 1) - offset
        begin = head // ratio * spec.head_size
        return (head % ratio == j) & (lane >= begin) & (lane < begin + spec.head_size)

    key_start, key_stop = spec.keys
    value_start, value_stop = spec.values
    spread = jnp.zeros((num_heads, key_stop), jnp.float32)
    for j in range(ratio):
        spread = jnp.where(own_lanes(spread.shape, 0, j), q[0, j : j + 1].astype(jnp.float32), spread)
    spread = spread.astype(q.dtype)
    _clear(refs.top, refs.total, refs.acc)

    def step(index: Any, slot: Any) -> None:
        values = _live_values(buffer[slot, :, value_start:value_stop], index, first, stop, spec)
        positions = index * spec.block + lax.broadcasted_iota(jnp.int32, (num_heads, spec.block), 1)
        visible = (positions >= first) & (positions < stop)
        scores = _scores(spread, buffer[slot, :, key_start:key_stop], visible, spec)
        _accumulate(scores, values, visible, refs.top, refs.total, refs.acc, spec)

    _Stream(refs, spec).run(span, step)
    result = refs.acc[...] / jnp.maximum(refs.total[:, :1], 1e-30)
    offset = spec.num_kv_heads * spec.head_size - value_start
    for j in range(ratio):
        refs.out[0, j] = jnp.sum(jnp.where(own_lanes(result.shape, offset, j), result, 0.0), axis=0).astype(refs.out.dtype)


def _decode(q: jax.Array, pages: jax.Array, batch: RaggedBatch, spec: _Spec) -> jax.Array:
    """[T, N, H] with the outputs of the decode rows, zero elsewhere."""
    num_tokens, num_heads, head_size = q.shape
    num_kv_heads, ratio = spec.num_kv_heads, spec.ratio
    num_rows, width = min(batch.num_rows, num_tokens), batch.block_tables.shape[1]
    tables = batch.block_tables[:num_rows].reshape(num_rows, 1, width)
    lens = jnp.where(jnp.arange(num_rows, dtype=jnp.int32) < batch.num_decode, batch.kv_lens[:num_rows], 0)
    key_lanes, (value_start, value_stop) = spec.keys[1], spec.values
    by_lane = q[:num_rows].reshape(num_rows, num_kv_heads, ratio, head_size).swapaxes(1, 2).reshape(num_rows, ratio, -1)
    by_lane = jnp.pad(by_lane, ((0, 0), (0, 0), (0, key_lanes - by_lane.shape[-1])))
    value_lanes = value_stop - value_start
    out = pl.pallas_call(
        functools.partial(_decode_kernel, spec=spec),
        out_shape=jax.ShapeDtypeStruct((num_rows, ratio, value_lanes), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_rows,),
            in_specs=[
                *_table_specs(num_rows, width, lambda row, *_: row),
                pl.BlockSpec((1, ratio, key_lanes), lambda row, *_: (row, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((1, ratio, value_lanes), lambda row, *_: (row, 0, 0)),
            scratch_shapes=_scratch((num_heads,), value_lanes, pages, spec),
        ),
        name="paged_decode",
    )(lens, tables, tables, by_lane, pages)
    out = out[:, :, num_kv_heads * head_size - value_start :]
    out = out.reshape(num_rows, ratio, num_kv_heads, head_size).swapaxes(1, 2).reshape(num_rows, num_heads, head_size)
    return jnp.pad(out, ((0, num_tokens - num_rows), (0, 0), (0, 0)))


# ---- prefill


def _prefill_kernel(rows: Any, counts: Any, starts: Any, *args: Any, spec: _Spec) -> None:
    del rows  # for the block table's index map
    refs = _Refs(*args)
    q, buffer, acc, top, total = refs.q, refs.buffer, refs.acc, refs.top, refs.total

    def span(tile: Any) -> _Span:
        return _Span(_first_seen(starts[tile], spec), jnp.where(counts[tile] > 0, starts[tile] + counts[tile], 0))

    first, stop = span(pl.program_id(0))
    position = starts[pl.program_id(0)]
    shape = (q.shape[2], spec.block)
    query_positions = position + lax.broadcasted_iota(jnp.int32, shape, 0) // spec.ratio
    for head in range(spec.num_kv_heads):
        _clear(top.at[head], total.at[head], acc.at[head])

    def step(index: Any, slot: Any) -> None:
        positions = index * spec.block + lax.broadcasted_iota(jnp.int32, shape, 1)
        visible = (positions <= query_positions) & (positions < stop)
        if spec.options.sliding_window is not None:
            visible &= positions > query_positions - spec.options.sliding_window
        for head in range(spec.num_kv_heads):
            key_start, key_stop = spec.window(head * spec.head_size)
            value_start, value_stop = spec.window((spec.num_kv_heads + head) * spec.head_size)
            values = _live_values(buffer[slot, :, value_start:value_stop], index, first, stop, spec)
            scores = _scores(q[head, 0, :, : key_stop - key_start], buffer[slot, :, key_start:key_stop], visible, spec)
            lanes = pl.ds(0, value_stop - value_start)
            _accumulate(scores, values, visible, top.at[head], total.at[head], acc.at[head, :, lanes], spec)

    _Stream(refs, spec).run(span, step)
    for head in range(spec.num_kv_heads):
        refs.out[head, 0] = (acc[head] / jnp.maximum(total[head][:, :1], 1e-30)).astype(refs.out.dtype)


def _placement(spec: _Spec, first: int, lanes: int) -> np.ndarray:
    """[K, H, lanes] of zeros and ones: moves each head to where it stands in its window; `first` is head 0's lane of a row."""
    ones = np.zeros((spec.num_kv_heads, spec.head_size, lanes), np.float32)
    for head in range(spec.num_kv_heads):
        begin = first + head * spec.head_size
        inside = begin - spec.window(begin)[0]
        ones[head, np.arange(spec.head_size), inside + np.arange(spec.head_size)] = 1
    return ones


def _prefill(out: jax.Array, q: jax.Array, pages: jax.Array, batch: RaggedBatch, spec: _Spec) -> jax.Array:
    """`out` with the outputs of the rows from `num_decode` on."""
    num_tokens, num_heads, head_size = q.shape
    num_kv_heads, ratio = spec.num_kv_heads, spec.ratio
    width = num_kv_heads * head_size

    def lanes_of(first: int) -> int:
        windows = [spec.window(first + head * head_size) for head in range(num_kv_heads)]
        return _up(max(stop - start for start, stop in windows))

    key_lanes, value_lanes = lanes_of(0), lanes_of(width)
    # Query and output blocks are double-buffered; accumulator and statistics are float32.
    row_bytes = num_kv_heads * ((key_lanes + value_lanes) * 2 * q.dtype.itemsize + (value_lanes + 2 * LANES) * 4)
    most = min(spec.tile_rows, PREFILL_BYTES // row_bytes)
    tiles = Tiles.of(batch, num_tokens, max(most // ratio // 8 * 8, 8))
    num_tiles, num_rows = tiles.rows.shape[0], tiles.size * ratio
    tables = batch.block_tables.reshape(batch.num_rows, 1, -1)
    queries = q[tiles.tokens].reshape(num_tiles, tiles.size, num_kv_heads, ratio, head_size)
    queries = jnp.einsum(
        "mtkrh,khl->kmtrl", queries, jnp.asarray(_placement(spec, 0, key_lanes), q.dtype), precision=spec.precision
    ).reshape(num_kv_heads, num_tiles, num_rows, key_lanes)
    result = pl.pallas_call(
        functools.partial(_prefill_kernel, spec=spec),
        out_shape=jax.ShapeDtypeStruct((num_kv_heads, num_tiles, num_rows, value_lanes), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num_tiles,),
            in_specs=[
                *_table_specs(num_tiles, tables.shape[-1], lambda tile, rows, *_: rows[tile]),
                pl.BlockSpec((num_kv_heads, 1, num_rows, key_lanes), lambda m, *_: (0, m, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((num_kv_heads, 1, num_rows, value_lanes), lambda m, *_: (0, m, 0, 0)),
            scratch_shapes=_scratch((num_kv_heads, num_rows), value_lanes, pages, spec),
        ),
        name="paged_prefill",
    )(tiles.rows, tiles.counts, tiles.positions, tables, tables, queries, pages)
    result = jnp.einsum(
        "kmtrl,khl->mtkrh",
        result.reshape(num_kv_heads, num_tiles, tiles.size, ratio, value_lanes),
        jnp.asarray(_placement(spec, width, value_lanes), q.dtype),
        precision=spec.precision,
    ).reshape(num_tiles * tiles.size, num_heads, head_size)
    taken = result.at[tiles.places].get(mode="fill", fill_value=0)
    return jnp.where((tiles.places < len(result))[:, None, None], taken, out)
