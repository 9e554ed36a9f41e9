"""The backends that run on any machine, and what the one door to all of them checks."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import re
import time
from mmap import PAGESIZE
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax.pallas_kernels import RaggedBatch, paged_attention, pages, pool_shape, write_targets
from pjax.pallas_kernels.kv_write import SlotTargets
from pjax.pallas_kernels.paged_attention import api, native
from pjax.pallas_kernels.pages import new_pool, touching, use_large_pages
from tests.pallas_kernels.suite import CASES, FEATURES, Feature, KernelSuite, Step, make_step

# These run fast: every case with every kind of shape, sizes that no accelerator's kernel has included.
SHAPES: list[tuple[tuple[int, int, int], int, dict[str, Any]]] = [
    ((9, 3, 64), 16, {}),
    ((4, 4, 80), 8, {"logit_softcap": 5.0}),
    ((4, 1, 32), 32, {"sliding_window": 70}),
    ((8, 1, 16), 128, {"sliding_window": 1, "scale": 0.3}),
    ((2, 2, 16), 4, {"sliding_window": 33, "logit_softcap": 2.0}),
    ((14, 2, 128), 16, {"sliding_window": 33, "logit_softcap": 2.0}),
]
ALL = FEATURES + [
    Feature(case, heads, page_size, options=options) for case in CASES if case != "long" for heads, page_size, options in SHAPES
]
LONG = [Feature("long", (2, 1, 64), 8), Feature("long", (2, 1, 64), 128, options={"sliding_window": 700})]


class TestXla(KernelSuite):
    backend = "xla"
    features: ClassVar = ALL + LONG


class TestReference(KernelSuite):
    backend = "reference"
    features: ClassVar = ALL


class TestNative(KernelSuite):
    backend = "native"
    write_backend = "native"
    features: ClassVar = [
        *ALL,
        *LONG,
        Feature("mixed", (71, 1, 64), 16),  # more heads share a KV head than a tile of prefill has rows
        Feature("mixed", (10, 2, 128), 16, options={"sliding_window": 20, "logit_softcap": 2.0}),
        Feature("chunk", (16, 1, 64), 8, "bfloat16", {"sliding_window": 70}),
    ]

    @classmethod
    def takes(cls, feature: Feature) -> bool:
        return feature.dtype in ("float32", "bfloat16") and feature.heads[2] in native.HEAD_SIZES

    def test_it_was_built(self) -> None:
        """The tests install pjax where a compiler is; XLA would serve as well, and nobody would notice."""
        assert native.native.library() is not None

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_queries_of_half_precision_over_pages_of_float32(self, dtype: str) -> None:
        """What an engine in bfloat16 asks for on a CPU, whose pool is float32."""
        feature = Feature("mixed", (4, 2, 64), 16)
        step = make_step(feature)
        pool, queries = jnp.asarray(step.pool_after), step.q.astype(dtype)
        out, wide = (paged_attention(q, pool, step.batch, num_kv_heads=2, backend="native") for q in (queries, queries.astype(jnp.float32)))
        assert out.dtype == queries.dtype
        np.testing.assert_array_equal(np.asarray(out), np.asarray(wide.astype(dtype)))


@pytest.mark.parametrize("backend", ["reference", "xla", "native"])
@pytest.mark.parametrize("where", ["query", "keys", "last key"])
@pytest.mark.parametrize("case", ["few", "mixed"])
def test_nan_shows(case: str, where: str, backend: str) -> None:
    """In the row that has it and in no other, a decode row of few or many tokens, whatever blocks its keys are read in."""
    step = make_step(Feature(case, (4, 2, 64), 16))
    pages, q, row = np.array(step.pool_after), step.q, {"few": 0, "mixed": 2}[case]
    table, length = np.asarray(step.batch.block_tables)[row], int(step.batch.kv_lens[row])
    if where == "query":
        q = q.at[row].set(jnp.nan)
    elif where == "keys":
        pages[table[:4], ..., :128] = np.nan
    else:
        pages[table[(length - 1) // 16], (length - 1) % 16, :128] = np.nan
    out = np.asarray(paged_attention(q, jnp.asarray(pages), step.batch, num_kv_heads=2, backend=backend))
    assert np.isnan(out[row]).all()
    assert np.isfinite(np.delete(out, row, axis=0)).all()


@pytest.fixture(scope="module")
def one() -> Step:
    return make_step(Feature("one", (4, 2, 16), 8))


@pytest.mark.parametrize("pool_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("is_native", [False, True])
def test_a_write_changes_only_the_named_slots(is_native: bool, dtype: str, pool_dtype: str) -> None:
    assert native.native.library() is not None
    pool = jnp.full(pool_shape(2, 3, 4, 2, 8), jnp.nan, pool_dtype)
    keys, values = jnp.full((3, 2, 8), 1.5, dtype), jnp.arange(48, dtype=dtype).reshape(3, 2, 8)
    targets = SlotTargets(jnp.array([5, 11, pool.shape[0] * 4], jnp.int32), is_native)  # the last one is padding
    out = np.asarray(jax.jit(lambda *arrays: targets.write(*arrays, 3), donate_argnums=0)(pool, keys, values)).reshape(-1, 2, 2, 8)
    assert (out[[17, 23], 0] == 1.5).all()
    np.testing.assert_array_equal(out[[17, 23], 1], np.arange(32, dtype=np.float32).reshape(2, 2, 8))
    assert np.isnan(np.delete(out, [17, 23], axis=0)).all()


def test_a_native_write_rounds_as_numpy_does() -> None:
    assert native.native.library() is not None
    numbers = np.random.default_rng(0).normal(size=(1, 2, 512)).astype(np.float32)
    numbers[0, 0, :6] = np.array([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7FFFFF, 0x00000001, 0x7FC00000], np.uint32).view(np.float32)
    pool, keys = jnp.zeros((1, 1, 2048), jnp.bfloat16), jnp.asarray(numbers)
    out = jax.jit(lambda pool: SlotTargets(jnp.zeros(1, jnp.int32), is_native=True).write(pool, keys, keys, 0))(pool)
    got, expected = np.asarray(out).reshape(2, 1024)[0], numbers.reshape(-1).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))


def test_a_pool_that_is_not_given_away_stays_as_it_is() -> None:
    assert native.native.library() is not None
    pool = jnp.zeros(pool_shape(1, 3, 4, 2, 8))
    targets = SlotTargets(jnp.array([2], jnp.int32), is_native=True)
    out = jax.jit(lambda pool, keys: targets.write(pool, keys, keys, 0))(pool, jnp.ones((1, 2, 8)))
    assert float(out.sum()) == 32
    assert float(pool.sum()) == 0


def touched_pool() -> jax.Array:
    """32 MiB, every second page written, and large pages asked for then."""
    pool = jax.jit(lambda: new_pool((64, 16, 8192), jnp.float32))()
    pool = jax.jit(lambda pool: pool.at[1::2].set(jnp.arange(8192.0)), donate_argnums=0)(pool)
    use_large_pages(pool)
    return pool


def test_large_pages_keep_what_is_written() -> None:
    np.testing.assert_array_equal(touched_pool()[1::2], np.broadcast_to(np.arange(8192, dtype=np.float32), (32, 16, 8192)))


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no large pages to ask for")
def test_large_pages_are_asked_for() -> None:
    pool = touched_pool()
    mapped = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags:(.*?)$", Path("/proc/self/smaps").read_text(), re.MULTILINE | re.DOTALL)
    middle = pool.unsafe_buffer_pointer() + pool.nbytes // 2
    (flags,) = [flags for start, end, flags in mapped if int(start, 16) <= middle < int(end, 16)]
    assert "hg" in flags.split()


def resident_share(pool: jax.Array) -> float:
    """Of the system's pages that lie wholly in the pool, those that have memory."""
    first = -(-pool.unsafe_buffer_pointer() // PAGESIZE) * PAGESIZE
    found = (ctypes.c_ubyte * ((pool.unsafe_buffer_pointer() + pool.nbytes - first) // PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(len(found) * PAGESIZE), found) == 0
    return float(np.mean(np.asarray(found) & 1))


def test_touching_takes_all_memory_and_keeps_what_is_written() -> None:
    # 64 MiB, for which the C library always asks the system: no memory of an earlier array
    pool = jax.jit(lambda: new_pool((64, 16, 16384), jnp.float32))()
    pool = jax.jit(lambda pool: pool.at[3].set(7.0), donate_argnums=0)(pool)
    assert resident_share(pool) < 0.5
    with touching(pool):
        pass
    assert resident_share(pool) == 1
    assert float(pool[3].min()) == float(pool[3].max()) == 7.0


def test_an_exception_ends_touching(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def touch(first: int, size: int) -> None:
        calls.append(size)
        time.sleep(0.01)

    monkeypatch.setattr(pages, "_library_of", lambda pool: SimpleNamespace(PjaxTouch=touch))
    monkeypatch.setattr(pages, "TOUCHED_AT_ONCE", 4096)
    pool = jnp.zeros((8, 16, 8192))
    with pytest.raises(KeyboardInterrupt), touching(pool):
        raise KeyboardInterrupt
    assert len(calls) < pool.nbytes // 4096
    calls.clear()
    small = jnp.zeros((10, 1000))
    with touching(small):
        pass
    assert calls == [4096] * 9 + [40000 - 9 * 4096]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads is 3, but must divide the 4 query heads"),
        ({"num_kv_heads": 4}, r"rows of 64, but must have 2·K·H = 128"),
        ({"backend": "tpo"}, "backend is 'tpo', but must be one of"),
        ({"sliding_window": 0}, "sliding_window is 0, but must be >= 1"),
        ({"sliding_window": 4.5}, "sliding_window is 4.5, but must be an integer"),
        ({"num_kv_heads": 2.0}, "num_kv_heads is 2.0, but must be an integer"),
        ({"logit_softcap": -1.0}, "logit_softcap is -1.0, but must be > 0"),
    ],
)
def test_bad_options_are_named(one: Step, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paged_attention(one.q, one.pool, one.batch, **{"num_kv_heads": 2} | changes)


def test_bad_arrays_are_named(one: Step) -> None:
    with pytest.raises(ValueError, match="q has dtype int32, but must be one of float32"):
        paged_attention(one.q.astype(jnp.int32), one.pool, one.batch, num_kv_heads=2)
    with pytest.raises(ValueError, match=r"q has shape \(4, 16\), but must be \[T, N, H\]"):
        paged_attention(one.q[0], one.pool, one.batch, num_kv_heads=2)
    with pytest.raises(ValueError, match=r"pages has shape .*, but must be \[P, G"):
        paged_attention(one.q, one.pool[0], one.batch, num_kv_heads=2)
    for field in ("kv_lens", "block_tables", "row_starts", "num_decode"):
        short = dataclasses.replace(one.batch, **{field: getattr(one.batch, field).astype(jnp.int16)})
        with pytest.raises(ValueError, match=rf"batch\.{field} is int16"):
            paged_attention(one.q, one.pool, short, num_kv_heads=2)


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"kv_lens": [81]}, r"kv_lens is over the 80 tokens of the block table's 10 pages: row 0 has 1 tokens, kv_len 81"),
    ({"kv_lens": [0]}, "kv_lens is less than the row's own tokens: row 0 has 1 tokens, kv_len 0"),
    ({"block_tables": [[-1] * 10]}, "block_tables has a page outside 0 to 9: row 0 .* pages \\[-1"),
    ({"block_tables": [[0] * 9 + [10]]}, "block_tables has a page outside 0 to 9: row 0"),
    ({"num_decode": 0, "decode_only": True}, "row_starts has tokens from num_decode on, but the batch is decode_only: row 0"),
    ({"num_decode": 2}, "num_decode is 2, but must be 0 to 1"),
    ({"row_starts": [0, 2]}, "row_starts goes from 0 to 2, but must start at 0 and end at 1"),
    ({"row_starts": [0, 0]}, "another count of tokens than 1 in a decode row: row 0 has 0 tokens"),
]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(("changes", "message"), BAD_VALUES, ids=str)
def test_bad_values_are_named_in_debug_mode(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str, jit: bool) -> None:
    monkeypatch.setenv("PJAX_DEBUG", "1")
    step = make_step(Feature("one", (4, 2, 16), 8))
    fields = {"row_starts": [0, 1], "kv_lens": [77], "block_tables": [list(range(10))], "num_decode": 1} | changes
    decode_only = fields.pop("decode_only", False)
    batch = RaggedBatch(**{name: jnp.asarray(value, jnp.int32) for name, value in fields.items()}, decode_only=decode_only)
    pool = jnp.zeros((10, 8, 64))

    def run(batch: RaggedBatch) -> jax.Array:
        return paged_attention(step.q, pool, batch, num_kv_heads=2, backend="xla")

    def wait() -> None:
        (jax.jit(run) if jit else run)(batch)
        jax.effects_barrier()

    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
        wait()


def test_good_values_pass_in_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJAX_DEBUG", "1")
    feature = Feature("mixed", (4, 2, 16), 8)
    step = make_step(feature)
    pool = jnp.asarray(step.pool_after)
    out = jax.jit(lambda batch: paged_attention(step.q, pool, batch, num_kv_heads=2, backend="xla"))(step.batch)
    np.testing.assert_allclose(np.asarray(out), step.expected, atol=2e-5, rtol=2e-5)


def test_the_fallback_says_why_once(one: Step, caplog: pytest.LogCaptureFixture) -> None:
    api._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="pjax"):
        for _ in range(2):
            paged_attention(one.q, one.pool, one.batch, num_kv_heads=2)
    (record,) = [r for r in caplog.records if "goes through XLA" in r.message]
    assert "'native' takes pages of float32 or bfloat16 and head sizes 64" in record.message
    assert record.levelno == logging.INFO


@pytest.mark.parametrize("backend", ["xla", "tpu", "native"])
def test_bad_writes_are_named(one: Step, backend: str) -> None:
    keys = jnp.ones((1, 2, 16))
    targets = write_targets(one.batch, one.pool, 1, backend=backend)
    for wrong in (keys.reshape(1, 32), keys.reshape(1, 16, 2)[:, :8], jnp.ones((2, 2, 16)), keys.astype(jnp.int32)):
        with pytest.raises(ValueError, match=r"(keys|values) is .*, but must be floating \[T, K, H\]|but must be \[P, G, 2·K·H\]"):
            targets.write(one.pool, wrong, wrong, 0)
    with pytest.raises(ValueError, match="backend of the KV write is 'gpu'"):
        write_targets(one.batch, one.pool, 1, backend="gpu")
    with pytest.raises(NotImplementedError, match="takes pages of a multiple of 8 tokens, but they have 12; 'xla' takes any"):
        write_targets(one.batch, jnp.zeros((4, 12, 64)), 1, backend="tpu")
    with pytest.raises(NotImplementedError, match="takes pages of float32 or bfloat16, but they are float16; 'xla' takes any"):
        write_targets(one.batch, one.pool.astype(jnp.float16), 1, backend="native")


@pytest.mark.parametrize(
    ("heads", "page_size", "dtype", "message"),
    [
        ((2, 1, 32), 16, "float32", "takes rows of at least 128 numbers, but pages have 2·K·H = 64"),
        ((2, 2, 64), 4, "float32", "takes pages of a multiple of 8 tokens and up to 3145728 bytes"),
        ((32, 32, 128), 128, "float32", "but they have 128 tokens and 4194304 bytes"),
    ],
)
def test_the_tpu_kernels_say_what_they_do_not_take(heads: tuple[int, int, int], page_size: int, dtype: str, message: str) -> None:
    num_heads, num_kv_heads, head_size = heads
    pool = jnp.zeros(pool_shape(1, 1, page_size, num_kv_heads, head_size), dtype)
    batch = RaggedBatch(*(jnp.asarray(x, jnp.int32) for x in ([0, 1], [1], [[0]], 1)))
    with pytest.raises(NotImplementedError, match=message):
        paged_attention(jnp.zeros((1, num_heads, head_size), dtype), pool, batch, num_kv_heads=num_kv_heads, backend="tpu")
