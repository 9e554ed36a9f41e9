"""Paged attention for NVIDIA GPUs from Ampere on (Pallas, Triton): one kernel for decode rows and for tiles of prefill queries.

A program takes one tile of queries, one KV head and one split of the tile's keys, and gathers blocks of tokens through the
block table; the number of blocks is that of live pages. Flash accumulation in float32 (Dao et al. 2022, algorithm 1).
Decode splits long sequences over programs, so that a few of them fill the chip; the splits are joined by their
log-sum-exp (Dao et al. 2023, "Flash-Decoding"). Queries of all R heads that share a KV head stand in one tile, row
token · R + r. Head sizes keep their own size in memory and are padded to a power of two in registers.

Products of float32 are exact (no tf32).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pjax.pallas_kernels.paged_attention.options import AttentionOptions
from pjax.pallas_kernels.paged_attention.ragged_batch import RaggedBatch
from pjax.pallas_kernels.paged_attention.splits import join_splits
from pjax.pallas_kernels.paged_attention.tiles import Tiles
from pjax.pallas_kernels.paged_attention.tuning import choose

MASKED = -1e30  # finite, so that a fully masked block gives no NaN
LEAST_ROWS = 16  # that a product takes
MAX_HEAD_SIZE = 256
LOG2E = math.log2(math.e)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How the work is cut. Every choice gives the same result; compiled code and speed differ."""

    rows: int  # query rows (token · R + r) of a tile, about; a tile has at least one token
    tokens: int  # of KV that one step of the inner loop takes, a power of two >= 16
    warps: int
    stages: int  # of the inner loop's pipeline
    programs: int = 1  # up to which the keys are split; 1: no split
    tokens_per_split: int = 256  # at least


CANDIDATES = {
    "decode": {"tokens": (32, 64, 128), "warps": (2, 4, 8), "stages": (2, 3), "programs": (512, 1024, 2048)},
    "prefill": {"rows": (64, 128), "tokens": (32, 64, 128), "warps": (4, 8), "stages": (2, 3)},
}


def default_sizes(q: jax.Array, pages: jax.Array, options: AttentionOptions, phase: str) -> Sizes:
    """Sizes that hold a tile in registers and its KV in shared memory on compute capability 8.0 to 10.0."""
    head_size, ratio, decode = q.shape[2], q.shape[1] // options.num_kv_heads, phase == "decode"
    wide = head_size > 128
    if q.dtype == jnp.float32:
        return Sizes(rows=16, tokens=16 if wide else 32, warps=4, stages=2, programs=1024 if decode else 256)
    if decode:
        return Sizes(rows=16, tokens=32 if wide else 64, warps=8 if ratio > 64 else 4, stages=2, programs=1024)
    return Sizes(rows=64 if wide else 128, tokens=32 if wide else 64, warps=8, stages=2, programs=256)


def why_not(q: jax.Array, pages: jax.Array, options: AttentionOptions) -> str | None:
    """The reason why the kernel can't be used for these arguments, or None."""
    if reason := options.why_not_numbers():
        return reason
    if q.dtype != pages.dtype:
        return f"takes one dtype for both, but q is {q.dtype} and pages are {pages.dtype}"
    if q.shape[-1] > MAX_HEAD_SIZE:
        return f"takes head sizes up to {MAX_HEAD_SIZE}, but q has {q.shape[-1]}"
    return None


def attend(
    q: jax.Array,
    pages: jax.Array,
    batch: RaggedBatch,
    options: AttentionOptions,
    sizes: Mapping[str, Sizes] | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attention of each packed token over its own sequence's pages. See `paged_attention` for arguments.

    Args:
      sizes: by phase; those that are not given are tuned ones, or the default.
      interpret: run without a GPU, for tests.
    """
    num_tokens = q.shape[0]
    chosen = choose("triton", default_sizes, q, pages, options, sizes)
    decode, prefill = chosen["decode"], chosen["prefill"]
    tiles = Tiles.of_decode(batch, num_tokens)
    out = _attend(q, pages, batch, options, tiles, decode, name="paged_decode", interpret=interpret)
    if batch.decode_only:
        return out
    tiles = Tiles.of(batch, num_tokens, max(prefill.rows * options.num_kv_heads // q.shape[1], 1))
    others = _attend(q, pages, batch, options, tiles, prefill, name="paged_prefill", interpret=interpret)
    return jnp.where((jnp.arange(num_tokens) < batch.num_decode)[:, None, None], out, others)


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """What the kernel needs to know when it is traced."""

    options: AttentionOptions
    sizes: Sizes
    ratio: int  # R = N / K
    head_size: int  # H
    page_size: int  # G
    tile_size: int  # query tokens of a tile
    splits: int

    @property
    def rows(self) -> int:
        """Query rows of a tile, padding included."""
        return max(pl.next_power_of_2(self.tile_size * self.ratio), LEAST_ROWS)

    @property
    def lanes(self) -> int:
        """H, padding included."""
        return max(pl.next_power_of_2(self.head_size), LEAST_ROWS)


def _attend(
    q: jax.Array,
    pages: jax.Array,
    batch: RaggedBatch,
    options: AttentionOptions,
    tiles: Tiles,
    sizes: Sizes,
    *,
    name: str,
    interpret: bool,
) -> jax.Array:
    """[T, N, H] with the outputs of the tiles' tokens, zero elsewhere."""
    num_heads, head_size = q.shape[1:]
    page_size, num_tiles = pages.shape[1], tiles.rows.shape[0]
    most_splits = -(-batch.block_tables.shape[1] * page_size // sizes.tokens_per_split)
    spec = _Spec(
        options=options,
        sizes=sizes,
        ratio=num_heads // options.num_kv_heads,
        head_size=head_size,
        page_size=page_size,
        tile_size=tiles.size,
        splits=max(min(sizes.programs // (num_tiles * options.num_kv_heads), most_splits), 1),
    )
    places = num_tiles * tiles.size
    out, lse = pl.pallas_call(
        functools.partial(_kernel, spec=spec),
        out_shape=[
            jax.ShapeDtypeStruct((spec.splits, places, num_heads, head_size), q.dtype if spec.splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((spec.splits, places, num_heads), jnp.float32),
        ],
        grid=(options.num_kv_heads, num_tiles, spec.splits),  # the first runs fastest: heads of one page side by side
        compiler_params=pltriton.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        interpret=interpret,
        name=name,
    )(q, pages, batch.block_tables, tiles.rows, tiles.counts, tiles.positions, tiles.tokens[:, 0])
    return join_splits(out, lse).astype(q.dtype).at[tiles.places].get(mode="fill", fill_value=0)


def _kernel(
    q: Any, pages: Any, tables: Any, rows: Any, counts: Any, positions: Any, tokens: Any, out: Any, lse: Any, *, spec: _Spec
) -> None:
    """One KV head, one tile, one split.

    Args:
      q: [T, N, H]. pages: [P, G, 2·K·H]. tables: [S, W].
      rows, counts, positions, tokens: [M], as in `Tiles`; `tokens` has each tile's first.
      out: [splits, M · tile_size, N, H]. lse: [splits, M · tile_size, N].
    """
    head, tile, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    row, count, position = rows[tile], counts[tile], positions[tile]
    stop = jnp.where(count > 0, position + count, 0)
    window = spec.options.sliding_window
    first = 0 if window is None else jnp.maximum(position - window + 1, 0)
    query, lane = jnp.arange(spec.rows, dtype=jnp.int32), jnp.arange(spec.lanes, dtype=jnp.int32)
    inside, query_head = query // spec.ratio, head * spec.ratio + query % spec.ratio
    live = (inside < count)[:, None] & (lane < spec.head_size)[None, :]
    index = (tokens[tile] + inside)[:, None], query_head[:, None], lane[None, :]
    queries = pltriton.load(q.at[index], mask=live, other=0.0)

    block = spec.sizes.tokens
    begin, end = _span(first, stop, split, spec)

    def step(index: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        kv_positions = index * block + jnp.arange(block, dtype=jnp.int32)
        owned = (kv_positions >= first) & (kv_positions < stop)
        page_ids = pltriton.load(tables.at[row, kv_positions // spec.page_size], mask=owned, other=0)
        # A slot that is not live may hold NaN, and 0 · NaN is NaN: it is not even read.
        mask = owned[:, None] & (lane < spec.head_size)[None, :]
        place = page_ids[:, None], (kv_positions % spec.page_size)[:, None]
        keys = pltriton.load(pages.at[(*place, (head * spec.head_size + lane)[None, :])], mask=mask, other=0.0)
        seen = (kv_positions[None, :] <= (position + inside)[:, None]) & owned[None, :]
        if window is not None:
            seen &= kv_positions[None, :] > (position + inside)[:, None] - window
        scores = jnp.where(seen, _scores(queries, keys, spec), MASKED)
        value_lane = (spec.options.num_kv_heads + head) * spec.head_size + lane
        values = pltriton.load(pages.at[(*place, value_lane[None, :])], mask=mask, other=0.0)
        return _accumulate(scores, seen, values, carry)

    start = (
        jnp.zeros((spec.rows, spec.lanes), jnp.float32),
        jnp.full((spec.rows,), MASKED, jnp.float32),
        jnp.zeros((spec.rows,), jnp.float32),
    )
    acc, top, total = lax.fori_loop(begin, end, step, start)
    total = jnp.where(total > 0, total, 1.0)
    place = tile * spec.tile_size + inside
    pltriton.store(out.at[split, place[:, None], query_head[:, None], lane[None, :]], (acc / total[:, None]).astype(out.dtype), mask=live)
    pltriton.store(lse.at[split, place, query_head], top + jnp.log2(total), mask=inside < count)


def _span(first: Any, stop: Any, split: Any, spec: _Spec) -> tuple[Any, Any]:
    """Blocks [begin, end) of this split: an equal part of those that hold [first, stop), but not less than is worth a program."""
    block = spec.sizes.tokens
    first_block, num_blocks = first // block, (stop + block - 1) // block
    if spec.splits == 1:
        return first_block, num_blocks
    least = -(-spec.sizes.tokens_per_split // block)
    part = jnp.maximum((num_blocks - first_block + spec.splits - 1) // spec.splits, least)
    begin = jnp.minimum(first_block + split * part, num_blocks)
    return begin, jnp.minimum(begin + part, num_blocks)


def _scores(queries: Any, keys: Any, spec: _Spec) -> Any:
    """float32 [rows, tokens]: scaled and capped, times log2(e), for exp2 is what the hardware has."""
    scores = _product(queries, keys, trans_b=True)
    cap = spec.options.logit_softcap
    if cap is None:
        return scores * (spec.options.scale * LOG2E)
    return jnp.tanh(scores * (spec.options.scale / cap)) * (cap * LOG2E)


def _accumulate(scores: Any, seen: Any, values: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """One flash step on accumulator [rows, lanes], maxima and sums [rows]."""
    acc, top, total = carry
    new_top = jnp.maximum(top, scores.max(axis=1))
    shrink = jnp.exp2(top - new_top)
    weights = jnp.where(seen, jnp.exp2(scores - new_top[:, None]), 0.0)
    return acc * shrink[:, None] + _product(weights.astype(values.dtype), values), new_top, total * shrink + weights.sum(axis=1)


def _product(a: Any, b: Any, *, trans_b: bool = False) -> Any:
    """float32; of float32 without rounding to tf32."""
    return pltriton.dot(a, b, trans_b=trans_b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)
