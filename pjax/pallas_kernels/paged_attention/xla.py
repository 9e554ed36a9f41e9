"""Paged attention for CPUs in plain XLA: flash accumulation over blocks of pages, with trip counts of the live length.

Decode rows go in groups: one gather of a few pages for each row of a group, then one batched product. The runner sorts
them by length, so that rows of a group end together. Rows with more tokens go in tiles of `Q_TILE` query tokens, each
over its own sequence's pages up to its last position. Loops run on trip counts that the device computes: a padded row
or tile costs nothing. Sizes were chosen by measurement (docs/decisions/0003-cpu-attention.md).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pjax.pallas_kernels.paged_attention.options import AttentionOptions, soft_capped
from pjax.pallas_kernels.paged_attention.ragged_batch import RaggedBatch
from pjax.pallas_kernels.pages import read_kv

DECODE_GROUP = 8  # rows that one iteration serves
DECODE_BLOCK = 64  # tokens of KV that one iteration reads for each row
Q_TILE = 64  # query tokens of a prefill tile
PREFILL_BLOCK = 128  # tokens of KV that one iteration reads for a tile
MASKED = -1e30  # finite, so that a fully masked block gives no NaN; exp(MASKED - max) is 0


def why_not(q: jax.Array, pages: jax.Array, options: AttentionOptions) -> str | None:
    """It takes everything, on every platform."""
    return None


def attend(q: jax.Array, pages: jax.Array, batch: RaggedBatch, options: AttentionOptions) -> jax.Array:
    """Attention of each packed token over its own sequence's pages. See `paged_attention` for arguments.

    Products accumulate in float32 whatever the dtypes. Padding gives zeros.
    """
    num_tokens, num_heads, head_size = q.shape
    grouped_q = q.reshape(num_tokens, options.num_kv_heads, num_heads // options.num_kv_heads, head_size)
    out = _decode_rows(grouped_q, pages, batch, options)
    if not batch.decode_only:
        out = _prefill_tiles(out, grouped_q, pages, batch, options)
    return out.reshape(num_tokens, num_heads, head_size)


def _flash(
    queries: jax.Array,  # [..., K, M, H]; M is a whole number of times the query heads of one KV head
    read_block: Callable[[jax.Array], jax.Array],  # block index -> [..., B, 2, K, H]
    first_block: jax.Array,
    num_blocks: jax.Array,
    block: int,
    visible: Callable[[jax.Array], jax.Array],  # kv positions [B] -> bool [..., M or 1, B]
    live: Callable[[jax.Array], jax.Array],  # kv positions [B] -> bool [..., B]: written slots
    options: AttentionOptions,
) -> jax.Array:
    """Softmax(q·Kᵀ)·V over blocks `[first_block, num_blocks)`, in float32. Source: Dao et al. 2022, algorithm 1."""
    queries = (queries.astype(jnp.float32) * options.scale).astype(queries.dtype)
    lead = queries.shape[:-1]

    def body(carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        index, top, total, acc = carry
        positions = index * block + jnp.arange(block, dtype=jnp.int32)
        kv = read_block(index)
        # A slot that nobody wrote may hold NaN, and 0 · NaN is NaN.
        kv = jnp.where(live(positions)[..., None, None, None], kv, jnp.zeros((), kv.dtype)).astype(queries.dtype)
        logits = jnp.einsum("...kmh,...bkh->...kmb", queries, kv[..., 0, :, :], preferred_element_type=jnp.float32)
        logits = soft_capped(logits, options.logit_softcap)
        logits = jnp.where(visible(positions)[..., None, :, :], logits, MASKED)
        new_top = jnp.maximum(top, logits.max(axis=-1))
        weights = jnp.exp(logits - new_top[..., None])
        weights = jnp.where(visible(positions)[..., None, :, :], weights, 0.0) if options.sliding_window is not None else weights
        shrink = jnp.exp(top - new_top)
        values = jnp.einsum("...kmb,...bkh->...kmh", weights.astype(kv.dtype), kv[..., 1, :, :], preferred_element_type=jnp.float32)
        return index + 1, new_top, total * shrink + weights.sum(axis=-1), acc * shrink[..., None] + values

    top, total = jnp.full(lead, MASKED, jnp.float32), jnp.zeros(lead, jnp.float32)
    if options.sinks is not None:  # as if a first block had held one key of each head, without a value
        by_group = options.sinks.astype(jnp.float32).reshape(options.num_kv_heads, -1)
        top, total = jnp.broadcast_to(jnp.tile(by_group, (1, lead[-1] // by_group.shape[1])), lead), jnp.ones(lead, jnp.float32)
    start = (
        first_block,
        top,
        total,
        jnp.zeros(queries.shape, jnp.float32),
    )
    _, _, total, acc = lax.while_loop(lambda carry: carry[0] < num_blocks, body, start)
    return acc / jnp.where(total == 0, 1.0, total)[..., None]


def _first_block(position: jax.Array, block: int, options: AttentionOptions) -> jax.Array:
    if options.sliding_window is None:
        return jnp.int32(0)
    return jnp.maximum(position - options.sliding_window + 1, 0) // block


def _see(query_positions: jax.Array, kv_positions: jax.Array, options: AttentionOptions) -> jax.Array:
    """bool [..., M, B]: causal, within the window."""
    seen = kv_positions <= query_positions[..., None]
    if options.sliding_window is not None:
        seen &= kv_positions > query_positions[..., None] - options.sliding_window
    return seen


def _table_block(table: jax.Array, index: jax.Array, pages_per_block: int) -> jax.Array:
    """Columns of block `index` of [..., W] tables; past the end they repeat the last column, whose tokens are masked."""
    columns = index * pages_per_block + jnp.arange(pages_per_block, dtype=jnp.int32)
    return jnp.take(table, columns, axis=-1, mode="clip")


def _decode_rows(q: jax.Array, pages: jax.Array, batch: RaggedBatch, options: AttentionOptions) -> jax.Array:
    """[T, K, R, H] with the outputs of the decode rows; zero elsewhere."""
    page_size = pages.shape[1]
    num_rows = min(batch.num_rows, q.shape[0])
    group = min(DECODE_GROUP, num_rows)
    block = max(DECODE_BLOCK // page_size, 1) * page_size

    def one_group(index: jax.Array, out: jax.Array) -> jax.Array:
        first = jnp.minimum(index * group, num_rows - group)
        rows = first + jnp.arange(group, dtype=jnp.int32)
        tables = lax.dynamic_slice_in_dim(batch.block_tables, first, group)
        lens = jnp.where(rows < batch.num_decode, lax.dynamic_slice_in_dim(batch.kv_lens, first, group), 0)
        lens = jnp.where(rows < index * group, 0, lens)  # the last group may reach back over rows that are done
        least = jnp.where(lens > 0, lens, lens.max()).min()
        result = _flash(
            lax.dynamic_slice_in_dim(q, first, group),
            lambda i: read_kv(pages, _table_block(tables, i, block // page_size), options.num_kv_heads),
            _first_block(least - 1, block, options),
            (lens.max() + block - 1) // block,
            block,
            lambda kv_positions: _see(lens[:, None] - 1, kv_positions, options),
            lambda kv_positions: kv_positions < lens[:, None],
            options,
        ).astype(q.dtype)
        kept = lax.dynamic_slice_in_dim(out, first, group)
        result = jnp.where((lens > 0)[:, None, None, None], result, kept)
        return lax.dynamic_update_slice_in_dim(out, result, first, 0)

    num_groups = (jnp.minimum(batch.num_decode, num_rows) + group - 1) // group
    return lax.fori_loop(0, num_groups, one_group, jnp.zeros_like(q))


def _prefill_tiles(out: jax.Array, q: jax.Array, pages: jax.Array, batch: RaggedBatch, options: AttentionOptions) -> jax.Array:
    """`out` with the outputs of the rows from `num_decode` on written into it, a tile of query tokens at a time."""
    page_size = pages.shape[1]
    num_tokens, num_kv_heads, ratio, head_size = q.shape
    tile = min(Q_TILE, num_tokens)
    block = max(PREFILL_BLOCK // page_size, 1) * page_size
    counts = batch.row_starts[1:] - batch.row_starts[:-1]
    counts = jnp.where(jnp.arange(batch.num_rows) < batch.num_decode, 0, counts)
    tile_ends = jnp.cumsum((counts + tile - 1) // tile).astype(jnp.int32)  # tiles of rows up to each

    def one_tile(index: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.searchsorted(tile_ends, index, side="right").astype(jnp.int32)
        end = batch.row_starts[row + 1]
        # Tiles count from the row's end; the first one of a row may be short.
        left = tile_ends[row] - index
        stop = end - (left - 1) * tile
        start = jnp.maximum(stop - tile, 0)  # the tile's tokens are [start, start + tile), of which its own are [own, stop)
        own = jnp.maximum(stop - tile, batch.row_starts[row])
        tokens = start + jnp.arange(tile, dtype=jnp.int32)
        mine = (tokens >= own) & (tokens < stop)
        positions = batch.kv_lens[row] - (end - tokens)
        queries = jnp.moveaxis(lax.dynamic_slice_in_dim(q, start, tile), 0, 1)  # [K, tile, R, H]
        table = batch.block_tables[row]
        query_positions = jnp.repeat(positions, ratio)
        last = batch.kv_lens[row] - (end - stop)  # tokens that this tile's last query sees
        result = _flash(
            queries.reshape(num_kv_heads, tile * ratio, head_size),
            lambda i: read_kv(pages, _table_block(table, i, block // page_size), num_kv_heads),
            _first_block(batch.kv_lens[row] - (end - own), block, options),
            (last + block - 1) // block,
            block,
            lambda kv_positions: _see(query_positions, kv_positions, options),
            lambda kv_positions: kv_positions < last,
            options,
        )
        result = jnp.moveaxis(result.reshape(num_kv_heads, tile, ratio, head_size), 1, 0).astype(q.dtype)
        kept = lax.dynamic_slice_in_dim(out, start, tile)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine[:, None, None, None], result, kept), start, 0)

    return lax.fori_loop(0, tile_ends[-1], one_tile, out)
