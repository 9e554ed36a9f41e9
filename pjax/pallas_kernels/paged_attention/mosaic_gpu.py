"""Paged attention for Hopper GPUs (H100, H200) in Pallas, Mosaic GPU: TMA copies of pages, wgmma products.

A block of the grid takes one tile of queries, one KV head and one split of the tile's keys. Of its warpgroups the last one
copies blocks of pages into shared memory, as the block table says, some blocks ahead; each of the others multiplies
64 query rows with them. Flash accumulation in float32 (Dao et al. 2022, algorithm 1; warp specialisation: Shah et al.
2024, "FlashAttention-3", section 3.1). The splits are joined by their log-sum-exp.

A tile's row is token · R + r: the R query heads that share a KV head stand side by side. A decode row is a tile of one
token, so that one kernel serves both; its rows are padded to 64 in shared memory only.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pjax.pallas_kernels.paged_attention.options import AttentionOptions
from pjax.pallas_kernels.paged_attention.ragged_batch import RaggedBatch
from pjax.pallas_kernels.paged_attention.splits import join_splits
from pjax.pallas_kernels.paged_attention.tiles import Tiles
from pjax.pallas_kernels.paged_attention.tuning import choose

MASKED = -1e30  # finite, so that a fully masked block gives no NaN
LOG2E = math.log2(math.e)
ROWS = 64  # query rows of a warpgroup: what wgmma takes
MOST_ROWS = 2 * ROWS
LEAST_PAGE = 8  # rows of a tile in shared memory
MAX_HEAD_SIZE = 256  # columns of one wgmma
SHARED_BYTES = 220 << 10  # of the 227 KiB that a block may have
# Registers of a thread, where three warpgroups share the 65,536 of a core: the products need them, the copies do not.
COPY_REGISTERS, PRODUCT_REGISTERS = 56, 224
AXES = ("split", "tile", "head")  # the last runs fastest: heads of one page side by side
THREAD = "warpgroup"
LAYOUT = plgpu.Layout.WGMMA
ACC = plgpu.ACC  # type: ignore[attr-defined]  # public, but not in its stub's list
NO_INDEX = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # before JAX 0.12 it wanted one
# What is worth measuring, by phase.
CANDIDATES = {
    "decode": {"slots": (2, 3, 4), "programs": (132, 264, 528)},
    "prefill": {"slots": (2, 3), "warpgroups": (1, 2)},
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What may be tuned, for each phase. Every choice gives the same result; speed differs. The defaults are not measured."""

    block: int = 64  # tokens of KV that one step of the inner loop takes; a multiple of 64
    # Blocks in shared memory at once, fewer where they do not fit. Three of 64 tokens of 128 are 96 KiB: two decode
    # tiles on a core, 192 KiB in flight.
    slots: int = 3
    warpgroups: int = 1  # that multiply, of 64 query rows each, 1 or 2; two share each copied page
    programs: int = 264  # up to which the keys are split: two on each of an H100's 132 cores
    tokens_per_split: int = 256  # at least


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """What the kernel needs to know when it is traced."""

    options: AttentionOptions
    ratio: int  # R = N / K
    head_size: int  # H
    page_size: int  # G
    block: int  # tokens
    slots: int
    splits: int
    least_blocks: int  # of a split
    warpgroups: int  # that multiply
    rows: int  # of a tile in global memory
    interpret: bool  # wgmma does not run in the interpreter, and it knows no layouts

    @property
    def box(self) -> int:
        """Tokens of one copy."""
        return min(self.block, self.page_size)

    @property
    def copies(self) -> int:
        """Number of copies that bring the keys, or the values, of a block."""
        return self.block // self.box

    @property
    def lanes(self) -> int:
        """Width of a tile in shared memory: all of a swizzle's span, so that H keeps its own size."""
        return plgpu.find_swizzle(self.head_size * 16) // 2

    def span(self, position: Any, count: Any, split: Any) -> _Span:
        """The work of one split of a tile: an equal part of its live blocks, but not less than is worth a split."""
        stop = jnp.where(count > 0, position + count, 0)
        window = self.options.sliding_window
        first = jnp.int32(0) if window is None else jnp.maximum(position - (window - 1), 0)
        end = lax.div(stop + (self.block - 1), jnp.int32(self.block))
        begin = lax.div(first, jnp.int32(self.block))
        part = jnp.maximum(lax.div(end - begin + (self.splits - 1), jnp.int32(self.splits)), self.least_blocks)
        begin = begin + split * part
        return _Span(first, stop, begin, jnp.maximum(jnp.minimum(begin + part, end) - begin, 0))


class _Span(NamedTuple):
    """Blocks [begin, begin + length) of the keys at [first, stop)."""

    first: Any
    stop: Any
    begin: Any
    length: Any


class _Shared(NamedTuple):
    """Shared memory of a block, and its barriers."""

    q: Any  # [warpgroups, 64, H]; the output later
    keys: Any  # [slots, block, H]
    values: Any
    lse: Any  # float32 [warpgroups, 64]
    q_there: Any  # barrier of each warpgroup
    keys_there: Any  # barrier of each slot
    values_there: Any
    tail_there: Any  # values of a block that is not full, before they are cleaned
    free: Any  # barrier of each slot: all warpgroups are done with it


def _one(barriers: Any, index: Any) -> Any:
    """One of several barriers; from JAX 0.12 on a lone one has no axis."""
    return barriers.at[index] if barriers.shape else barriers


# ---- the call


def why_not(q: jax.Array, pages: jax.Array, options: AttentionOptions, *, compute_capability: str | None = None) -> str | None:
    """The reason why the kernel can't be used for these arguments, or None.

    `compute_capability`: of the device that will run it, as "9.0"; by default that of JAX's first device.
    """
    if reason := options.why_not_numbers():
        return reason
    head_size, page_size, ratio = q.shape[2], pages.shape[1], q.shape[1] // options.num_kv_heads
    if q.dtype != pages.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return (
            f"takes bfloat16 or float16, the same for both, but q is {q.dtype} and pages are {pages.dtype} "
            "(wgmma rounds float32 to tf32; 'triton' is exact)"
        )
    if head_size % 16 or head_size > MAX_HEAD_SIZE:
        return f"takes head sizes that are multiples of 16 up to {MAX_HEAD_SIZE} (wgmma), but q has {head_size}"
    if page_size < LEAST_PAGE or page_size & (page_size - 1):
        return f"takes page sizes that are powers of two from {LEAST_PAGE} on (TMA boxes), but pages have {page_size}"
    if ratio > MOST_ROWS:
        return f"takes up to {MOST_ROWS} query heads to a KV head, but q has {ratio}"
    device = jax.devices()[0]
    found = compute_capability or str(getattr(device, "compute_capability", f"that of {device.device_kind!r}"))
    if not found.startswith("9."):
        return f"takes GPUs of compute capability 9.x (Hopper: wgmma), but the compute capability is {found}"
    return None


def attend(
    q: jax.Array,
    pages: jax.Array,
    batch: RaggedBatch,
    options: AttentionOptions,
    sizes: Mapping[str, Sizes] | None = None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Attention of each packed token over its own sequence's pages. See `paged_attention` for arguments.

    Args:
      sizes: by phase; those that are not given are tuned ones, or the default.
      interpret: parameters of Mosaic GPU's interpreter, to run without a GPU.
    """
    num_tokens, ratio = q.shape[0], q.shape[1] // options.num_kv_heads
    chosen = choose("mosaic_gpu", default_sizes, q, pages, options, sizes)
    if ratio > ROWS:  # one warpgroup's rows do not hold a token's heads
        chosen = {phase: dataclasses.replace(one, warpgroups=2) for phase, one in chosen.items()}
    call = functools.partial(_attend, q, pages, batch, options, interpret=interpret)
    out = call(Tiles.of_decode(batch, num_tokens), chosen["decode"], name="paged_decode")
    if batch.decode_only:
        return out
    tiles = Tiles.of(batch, num_tokens, chosen["prefill"].warpgroups * ROWS // ratio)
    others = call(tiles, chosen["prefill"], name="paged_prefill")
    return jnp.where((jnp.arange(num_tokens, dtype=jnp.int32) < batch.num_decode)[:, None, None], out, others)


def default_sizes(q: jax.Array, pages: jax.Array, options: AttentionOptions, phase: str) -> Sizes:
    """Sizes for "decode" or "prefill"."""
    return Sizes(warpgroups=2 if phase == "prefill" else 1)


def _attend(
    q: jax.Array,
    pages: jax.Array,
    batch: RaggedBatch,
    options: AttentionOptions,
    tiles: Tiles,
    sizes: Sizes,
    *,
    name: str,
    interpret: Any,
) -> jax.Array:
    """[T, N, H] with the outputs of the tiles' tokens, zero elsewhere."""
    num_heads, head_size = q.shape[1:]
    num_kv_heads, page_size, num_tiles = options.num_kv_heads, pages.shape[1], tiles.rows.shape[0]
    ratio = num_heads // num_kv_heads
    warpgroups, live_rows = sizes.warpgroups, tiles.size * ratio
    most_splits = -(-batch.block_tables.shape[1] * page_size // sizes.tokens_per_split)
    fits = (SHARED_BYTES - warpgroups * ROWS * head_size * 2) // (sizes.block * head_size * 4)
    spec = _Spec(
        options=options,
        ratio=ratio,
        head_size=head_size,
        page_size=page_size,
        block=sizes.block,
        slots=max(min(sizes.slots, fits), 1),
        splits=max(min(sizes.programs // (num_tiles * num_kv_heads), most_splits), 1),
        least_blocks=-(-sizes.tokens_per_split // sizes.block),
        warpgroups=warpgroups,
        rows=-(-live_rows // 8) * 8 if live_rows <= ROWS and warpgroups == 1 else warpgroups * ROWS,
        interpret=interpret is not None,
    )
    by_head = q[tiles.tokens].reshape(num_tiles, tiles.size, num_kv_heads, ratio, head_size).swapaxes(1, 2)
    by_head = by_head.reshape(num_tiles, num_kv_heads, live_rows, head_size)
    by_head = jnp.pad(by_head, ((0, 0), (0, 0), (0, spec.rows - live_rows), (0, 0)))
    heads = pages.reshape(-1, page_size, 2 * num_kv_heads, head_size)  # keys of all heads, then values
    shape = (spec.splits, num_tiles, num_kv_heads, spec.rows)
    out, lse = plgpu.kernel(
        functools.partial(_kernel, spec=spec),
        out_type=[jax.ShapeDtypeStruct((*shape, head_size), q.dtype), jax.ShapeDtypeStruct(shape, jnp.float32)],
        scratch_types=_scratch(spec, q.dtype),
        grid=shape[:3],
        grid_names=AXES,
        num_threads=warpgroups + 1,
        thread_name=THREAD,
        kernel_name=name,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(by_head, heads, batch.block_tables, tiles.rows, tiles.counts, tiles.positions)
    joined = join_splits(out, lse)[:, :, :live_rows].astype(q.dtype)
    joined = joined.reshape(num_tiles, num_kv_heads, tiles.size, ratio, head_size).swapaxes(1, 2)
    return joined.reshape(num_tiles * tiles.size, num_heads, head_size).at[tiles.places].get(mode="fill", fill_value=0)


def _scratch(spec: _Spec, dtype: Any) -> _Shared:
    transforms = (plgpu.TilingTransform((8, spec.lanes)), plgpu.SwizzleTransform(spec.lanes * 2))
    blocks = plgpu.SMEM((spec.slots, spec.block, spec.head_size), dtype, transforms=transforms)
    return _Shared(
        q=plgpu.SMEM((spec.warpgroups, ROWS, spec.head_size), dtype, transforms=transforms),
        keys=blocks,
        values=blocks,
        lse=plgpu.SMEM((spec.warpgroups, ROWS), jnp.float32),
        q_there=plgpu.Barrier(num_barriers=spec.warpgroups),
        keys_there=plgpu.Barrier(num_arrivals=spec.copies, num_barriers=spec.slots),
        values_there=plgpu.Barrier(num_arrivals=spec.copies, num_barriers=spec.slots),
        tail_there=plgpu.Barrier(num_arrivals=spec.copies),
        free=plgpu.Barrier(num_arrivals=spec.warpgroups, num_barriers=spec.slots),
    )


# ---- the kernel


def _kernel(
    q: Any, pages: Any, tables: Any, rows: Any, counts: Any, positions: Any, out: Any, lse: Any, *scratch: Any, spec: _Spec
) -> None:
    """One KV head, one tile, one split.

    Args:
      q: [M, K, rows, H]. pages: [P, G, 2·K, H]. tables: [S, W].
      rows, counts, positions: [M], as in `Tiles`.
      out: [splits, M, K, rows, H]. lse: [splits, M, K, rows], base 2.
    """
    split, tile, head = (lax.axis_index(axis) for axis in AXES)
    warpgroup = lax.axis_index(THREAD)
    shared = _Shared(*scratch)
    position = positions[tile]
    span = spec.span(position, counts[tile], split)

    @pl.when(warpgroup == spec.warpgroups)
    def copy() -> None:
        _copy(pages, tables, rows[tile], head, span, shared, spec)

    @pl.when(warpgroup < spec.warpgroups)
    def multiply() -> None:
        if spec.warpgroups > 1:
            plgpu.set_max_registers(PRODUCT_REGISTERS, action="increase")
        own = pl.ds(0, spec.rows) if spec.warpgroups == 1 else pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)
        _load_queries(q.at[tile, head, own], warpgroup, shared, spec)
        result, result_lse = _multiply(position, span, warpgroup, shared, spec)
        _store(result, result_lse, out.at[split, tile, head, own], lse.at[split, tile, head, own], warpgroup, shared, spec)


def _copy(pages: Any, tables: Any, row: Any, head: Any, span: _Span, shared: _Shared, spec: _Spec) -> None:
    """Moves the span's blocks into shared memory, as slots become free."""
    if spec.warpgroups > 1:
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
    first_page = lax.div(span.first, jnp.int32(spec.page_size))
    last_page = lax.div(jnp.maximum(span.stop - 1, 0), jnp.int32(spec.page_size))

    def fetch(index: Any, _: None) -> None:
        slot = lax.rem(index, jnp.int32(spec.slots))

        @pl.when(index >= spec.slots)
        def wait_for_slot() -> None:
            plgpu.barrier_wait(_one(shared.free, slot))

        begin = (span.begin + index) * spec.block
        inside = lax.rem(begin, jnp.int32(spec.page_size)) if spec.page_size > spec.block else 0
        column = lax.div(begin, jnp.int32(spec.page_size))
        # Columns without a live token repeat a live page: what other pages hold may be anything.
        page_ids = [tables[row, jnp.clip(column + j, first_page, last_page)] for j in range(spec.copies)]

        def start(lane_head: Any, target: Any, barrier: Any) -> None:
            for j, page in enumerate(page_ids):
                source = pages.at[page, pl.ds(inside, spec.box), lane_head]
                plgpu.copy_gmem_to_smem(source, target.at[slot, pl.ds(j * spec.box, spec.box)], barrier)

        start(head, shared.keys, _one(shared.keys_there, slot))
        full = begin + spec.block <= span.stop

        @pl.when(full)
        def copy_values() -> None:
            start(spec.options.num_kv_heads + head, shared.values, _one(shared.values_there, slot))

        @pl.when(jnp.logical_not(full))
        def copy_and_clean_values() -> None:
            start(spec.options.num_kv_heads + head, shared.values, _one(shared.tail_there, 0))
            plgpu.barrier_wait(_one(shared.tail_there, 0))
            _clean(shared.values.at[slot], span.stop - begin, spec)
            for _ in range(spec.copies):
                plgpu.barrier_arrive(_one(shared.values_there, slot))

    def drain(index: Any, _: None) -> None:
        plgpu.barrier_wait(_one(shared.free, lax.rem(index, jnp.int32(spec.slots))))

    lax.fori_loop(0, span.length, fetch, None)
    lax.fori_loop(jnp.maximum(span.length - spec.slots, 0), span.length, drain, None)  # no arrival goes unseen


def _clean(values: Any, live: Any, spec: _Spec) -> None:
    """Zeros in the rows from `live` on: such a slot may hold NaN, and 0 · NaN is NaN. A few lanes at a time: few registers."""
    for lane in range(0, spec.head_size, spec.lanes):
        part = values.at[:, pl.ds(lane, spec.lanes)]
        loaded = part[...] if spec.interpret else plgpu.load(part, *NO_INDEX, layout=LAYOUT)
        part[...] = jnp.where(_iota(loaded.shape, 0, spec) < live, loaded, jnp.zeros((), loaded.dtype))
    plgpu.commit_smem()


def _load_queries(q: Any, warpgroup: Any, shared: _Shared, spec: _Spec) -> None:
    target = shared.q.at[warpgroup]
    if spec.rows < ROWS:
        target[...] = _in_layout(jnp.zeros(target.shape, target.dtype), LAYOUT, spec)
        plgpu.commit_smem()
        target = target.at[pl.ds(0, spec.rows)]
    plgpu.copy_gmem_to_smem(q, target, _one(shared.q_there, warpgroup))
    plgpu.barrier_wait(_one(shared.q_there, warpgroup))


def _multiply(position: Any, span: _Span, warpgroup: Any, shared: _Shared, spec: _Spec) -> tuple[Any, Any]:
    """The span's attention for 64 query rows, float32 [64, H], and its log-sum-exp [64]. Dead rows hold anything."""
    queries, window = shared.q.at[warpgroup], spec.options.sliding_window
    wide = (ROWS, spec.head_size)

    def step(index: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        acc, top, total = carry
        slot = lax.rem(index, jnp.int32(spec.slots))
        plgpu.barrier_wait(_one(shared.keys_there, slot))
        scores = _capped(_scores(queries, shared.keys.at[slot], spec), spec)
        # A key is seen when key - position <= row // R, without the division.
        ahead = (_iota(scores.shape, 1, spec) + ((span.begin + index) * spec.block - position)) * spec.ratio
        row = _iota(scores.shape, 0, spec) + warpgroup * ROWS
        seen = ahead <= row
        if window is not None:
            seen = seen & (ahead + window * spec.ratio > row)
        scores = jnp.where(seen, scores, MASKED)
        new_top = jnp.maximum(top, scores.max(axis=1))
        shrink = jnp.exp2(top - new_top)
        # Where a row has seen nothing yet these are ones; the first key that it sees shrinks them to zero.
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, scores.shape, [0]))
        total = total * shrink + weights.sum(axis=1)
        acc = acc * lax.broadcast_in_dim(shrink, wide, [0])
        plgpu.barrier_wait(_one(shared.values_there, slot))
        acc = _add_product(acc, weights.astype(queries.dtype), shared.values.at[slot], spec)
        plgpu.barrier_arrive(_one(shared.free, slot))
        return acc, new_top, total

    start = (
        _in_layout(jnp.zeros(wide, jnp.float32), LAYOUT, spec),
        _in_layout(jnp.full((ROWS,), MASKED, jnp.float32), LAYOUT.reduce(1), spec),
        _in_layout(jnp.zeros((ROWS,), jnp.float32), LAYOUT.reduce(1), spec),
    )
    acc, top, total = lax.fori_loop(0, span.length, step, start)
    total = jnp.where(total > 0, total, 1.0)
    return acc / lax.broadcast_in_dim(total, wide, [0]), top + jnp.log(total) * LOG2E


def _store(result: Any, result_lse: Any, out: Any, lse: Any, warpgroup: Any, shared: _Shared, spec: _Spec) -> None:
    """By way of shared memory; the queries are no longer needed there."""
    staged, staged_lse = shared.q.at[warpgroup], shared.lse.at[warpgroup]
    staged[...] = result.astype(staged.dtype)
    staged_lse[...] = result_lse
    plgpu.commit_smem()
    if spec.rows < ROWS:
        staged, staged_lse = staged.at[pl.ds(0, spec.rows)], staged_lse.at[pl.ds(0, spec.rows)]
    plgpu.copy_smem_to_gmem(staged, out)
    plgpu.copy_smem_to_gmem(staged_lse, lse)
    plgpu.wait_smem_to_gmem(0)


def _capped(scores: Any, spec: _Spec) -> Any:
    """Scaled and capped, times log2(e), for exp2 is what the hardware has."""
    cap = spec.options.logit_softcap
    if cap is None:
        return scores * (spec.options.scale * LOG2E)
    doubled = jnp.exp2(scores * (2 * LOG2E * spec.options.scale / cap))  # tanh x = 1 - 2 / (e^2x + 1)
    return (cap * LOG2E) - (2 * cap * LOG2E) / (doubled + 1.0)


# ---- what the interpreter does in its own way


def _scores(queries: Any, keys: Any, spec: _Spec) -> Any:
    """float32 [64, block]: queries [64, H] times keys [block, H]."""
    if spec.interpret:
        return jnp.dot(queries[...].astype(jnp.float32), keys[...].astype(jnp.float32).T)

    def product(acc: Any) -> Any:
        plgpu.wgmma(acc, queries, keys.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(product, ACC((ROWS, spec.block), jnp.float32))


def _add_product(acc: Any, weights: Any, values: Any, spec: _Spec) -> Any:
    """acc [64, H] plus weights [64, block] times values [block, H]."""
    if spec.interpret:
        return acc + jnp.dot(weights.astype(jnp.float32), values[...].astype(jnp.float32))
    return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(ACC.init(acc))


def _iota(shape: tuple[int, ...], dimension: int, spec: _Spec) -> Any:
    if spec.interpret:
        return lax.broadcasted_iota(jnp.int32, shape, dimension)
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=LAYOUT)


def _in_layout(value: Any, layout: Any, spec: _Spec) -> Any:
    return value if spec.interpret else plgpu.layout_cast(value, layout)
