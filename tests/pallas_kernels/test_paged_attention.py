"""Backends against float64 numpy: ragged batches, NaN wherever nobody owns the memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax.pallas_kernels import RaggedBatch, paged_attention
from pjax.pallas_kernels.paged_attention import native
from pjax.pallas_kernels.pages import pool_shape, write_kv

# (query tokens, tokens in the cache after the step) of each row; decode rows come first
CASES = {
    "decode": ([(1, 1), (1, 5), (1, 64), (1, 65), (1, 200), (1, 17), (1, 129), (1, 2), (1, 31), (1, 300)], 10, 10),
    "one": ([(1, 77)], 1, 1),
    "prefill": ([(150, 150)], 160, 4),
    "chunk": ([(37, 190), (64, 64), (3, 258)], 128, 4),
    "mixed": ([(1, 40), (1, 3), (1, 129), (70, 70), (2, 2), (5, 140), (65, 201)], 160, 12),
    "padding": ([], 16, 4),
    "narrow": ([(1, 9), (3, 20)], 8, 8),
}
PAD_ROWS_BETWEEN = 1


def make_case(name: str, *, page_size: int, num_heads: int, num_kv_heads: int, head_size: int, dtype: str, seed: int = 0):
    """A batch with pages in random order; every slot that no row owns holds NaN, and so do unused table entries' pages."""
    rows, num_tokens, num_rows = CASES[name]
    rng = np.random.default_rng(seed)
    width = 300 // page_size + 2
    needed = sum(-(-kv // page_size) for _, kv in rows)
    num_pages = needed + 3
    order = rng.permutation(num_pages - 1) + 1  # page 0 stays unowned: unused table entries point to it
    tables = np.zeros((num_rows, width), np.int32)
    pool = np.full(pool_shape(1, num_pages, page_size, num_kv_heads, head_size), np.nan, np.float32)
    row_starts = np.zeros(num_rows + 1, np.int32)
    kv_lens = np.zeros(num_rows, np.int32)
    keys, values, taken = [], [], 0
    for i, (count, kv_len) in enumerate(rows):
        num = -(-kv_len // page_size)
        tables[i, :num] = order[taken : taken + num]
        taken += num
        row_starts[i + 1] = row_starts[i] + count
        kv_lens[i] = kv_len
        k, v = (rng.standard_normal((kv_len, num_kv_heads, head_size)).astype(np.float32) for _ in range(2))
        keys.append(k)
        values.append(v)
        slots = tables[i, np.arange(kv_len) // page_size] * page_size + np.arange(kv_len) % page_size
        pool = np.array(write_kv(jnp.asarray(pool), jnp.asarray(k), jnp.asarray(v), jnp.asarray(slots)))
    row_starts[len(rows) + 1 :] = row_starts[len(rows)]
    num_decode = next((i for i, (count, _) in enumerate(rows) if count != 1), len(rows))
    batch = RaggedBatch(*(jnp.asarray(a) for a in (row_starts, kv_lens, tables, np.int32(num_decode))))
    q = rng.standard_normal((num_tokens, num_heads, head_size)).astype(np.float32)
    return jnp.asarray(q, dtype), jnp.asarray(pool, dtype), batch, keys, values, rows


def expected(q, keys, values, rows, *, scale, window=None, softcap=None):
    """float64, one token and one head at a time."""
    q = np.asarray(q, np.float64)
    out = np.zeros(q.shape)
    token = 0
    for (count, kv_len), k, v in zip(rows, keys, values, strict=True):
        ratio = q.shape[1] // k.shape[1]
        for position in range(kv_len - count, kv_len):
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(q.shape[1]):
                logits = k[first : position + 1, head // ratio].astype(np.float64) @ q[token, head] * scale
                if softcap is not None:
                    logits = softcap * np.tanh(logits / softcap)
                weights = np.exp(logits - logits.max())
                out[token, head] = weights / weights.sum() @ v[first : position + 1, head // ratio]
            token += 1
    return out, token


@pytest.mark.parametrize("backend", ["native", "xla", "reference"])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize(
    ("heads", "page_size", "options"),
    [
        ((9, 3, 64), 16, {}),
        ((4, 4, 80), 8, {"logit_softcap": 5.0}),
        ((4, 1, 32), 32, {"sliding_window": 70}),
        ((8, 1, 16), 128, {"sliding_window": 1, "scale": 0.3}),
        ((2, 2, 16), 4, {"sliding_window": 33, "logit_softcap": 2.0}),
        ((14, 2, 128), 16, {"sliding_window": 33, "logit_softcap": 2.0}),
    ],
    ids=str,
)
def test_matches_float64_and_never_reads_unowned_memory(backend, case, heads, page_size, options):
    num_heads, num_kv_heads, head_size = heads
    if backend == "native" and head_size not in native.HEAD_SIZES:
        pytest.skip(f"no native kernel for heads of {head_size}")
    q, pool, batch, keys, values, rows = make_case(
        case, page_size=page_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, dtype="float32"
    )
    call = jax.jit(lambda q, pool, batch: paged_attention(q, pool, batch, num_kv_heads=num_kv_heads, backend=backend, **options))
    got = np.asarray(call(q, pool, batch))
    want, num_live = expected(
        q, keys, values, rows, scale=options.get("scale", head_size**-0.5),
        window=options.get("sliding_window"), softcap=options.get("logit_softcap"),
    )  # fmt: skip
    np.testing.assert_allclose(got[:num_live], want[:num_live], atol=2e-5, rtol=2e-5)
    assert (got[num_live:] == 0).all()


def test_native_kernel_refuses_what_it_does_not_take():
    q, pool, batch, *_ = make_case("one", page_size=8, num_heads=4, num_kv_heads=2, head_size=16, dtype="float32")
    with pytest.raises(ValueError, match=r"'native' takes float32 and head sizes 64, .* but q is float32 of 16"):
        paged_attention(q, pool, batch, num_kv_heads=2, backend="native")


def test_native_kernel_was_built():
    """The tests install pjax where a compiler is; without one this is the only test of it that fails."""
    assert native.is_available()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    q, pool, batch, keys, values, rows = make_case("mixed", page_size=16, num_heads=6, num_kv_heads=2, head_size=64, dtype=dtype)
    keys, values = ([np.asarray(jnp.asarray(x, dtype), np.float32) for x in xs] for xs in (keys, values))
    got = np.asarray(paged_attention(q, pool, batch, num_kv_heads=2), np.float32)
    want, num_live = expected(q, keys, values, rows, scale=64**-0.5)
    np.testing.assert_allclose(got[:num_live], want[:num_live], atol=1e-2, rtol=1e-2)


def test_write_changes_only_the_named_slots():
    pool = jnp.full(pool_shape(2, 3, 4, 2, 8), jnp.nan)
    keys, values = jnp.ones((3, 2, 8)), jnp.full((3, 2, 8), 2.0)
    slots = jnp.array([5, 23, pool.shape[0] * 4], jnp.int32)  # the last one is padding
    out = np.asarray(write_kv(pool, keys, values, slots)).reshape(-1, 2, 2, 8)
    assert (out[[5, 23], 0] == 1).all()
    assert (out[[5, 23], 1] == 2).all()
    assert np.isnan(np.delete(out, [5, 23], axis=0)).all()


def test_bad_arguments_are_named():
    q, pool, batch, *_ = make_case("one", page_size=8, num_heads=4, num_kv_heads=2, head_size=16, dtype="float32")
    with pytest.raises(ValueError, match="num_kv_heads is 3, but must divide the 4 query heads"):
        paged_attention(q, pool, batch, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"rows of 64, but must have 2·K·H = 128"):
        paged_attention(q, pool, batch, num_kv_heads=4)
    with pytest.raises(ValueError, match="backend is 'tpo'"):
        paged_attention(q, pool, batch, num_kv_heads=2, backend="tpo")
    with pytest.raises(ValueError, match="sliding_window is 0"):
        paged_attention(q, pool, batch, num_kv_heads=2, sliding_window=0)
    with pytest.raises(ValueError, match="q has dtype int32"):
        paged_attention(q.astype(jnp.int32), pool, batch, num_kv_heads=2)
    with pytest.raises(ValueError, match=r"batch.kv_lens is int16"):
        paged_attention(
            q, pool, RaggedBatch(batch.row_starts, batch.kv_lens.astype(jnp.int16), batch.block_tables, batch.num_decode), num_kv_heads=2
        )
