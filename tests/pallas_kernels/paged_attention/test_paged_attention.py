"""The backends that run on any machine, and what the one door to all of them checks."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax.native import library
from pjax.pallas_kernels import RaggedBatch, paged_attention, pool_shape
from pjax.pallas_kernels.paged_attention import api, native
from tests.pallas_kernels.paged_attention.suite import CASES, FEATURES, PADDED_CASES, Feature, KernelSuite, Step, make_step

# These run fast: every case with every kind of shape, sizes that no accelerator's kernel has included.
SHAPES: list[tuple[tuple[int, int, int], int, dict[str, Any]]] = [
    ((9, 3, 64), 16, {}),
    ((4, 4, 80), 8, {"logit_softcap": 5.0}),
    ((4, 1, 32), 32, {"sliding_window": 70}),
    ((8, 1, 16), 128, {"sliding_window": 1, "scale": 0.3}),
    ((2, 2, 16), 4, {"sliding_window": 33, "logit_softcap": 2.0}),
    ((14, 2, 128), 16, {"sliding_window": 33, "logit_softcap": 2.0}),
]
PADDED = [Feature(case, heads, page_size, options=options, is_padded=True) for heads, page_size, options in SHAPES for case in PADDED_CASES]
EXACT = [Feature(case, heads, page_size, options=options) for heads, page_size, options in SHAPES for case in CASES if case != "long"]
ALL = FEATURES + PADDED + EXACT
LONG = [Feature("long", (2, 1, 64), 8), Feature("long", (2, 1, 64), 128, options={"sliding_window": 700})]
MORE = [
    Feature("mixed", (71, 1, 64), 16),  # more heads share a KV head than a tile of prefill has rows
    Feature("mixed", (10, 2, 128), 16, options={"sliding_window": 20, "logit_softcap": 2.0}),
    Feature("chunk", (16, 1, 64), 8, "bfloat16", {"sliding_window": 70}),
]


@pytest.mark.usefixtures("kept_programs")
class SharingSuite(KernelSuite):
    """Cases of the same kind and sizes are one program."""

    programs: ClassVar[dict[tuple[Any, ...], Any]] = {}
    everyday = tuple(map(str, FEATURES + PADDED + LONG + MORE))

    def program(self, feature: Feature) -> Any:
        key = (type(self), feature.heads, feature.page_size, feature.dtype, *feature.options.items())
        if key not in self.programs:
            self.programs[key] = super().program(feature)
        return self.programs[key]


class TestXla(SharingSuite):
    backend = "xla"
    features: ClassVar = ALL + LONG


class TestReference(SharingSuite):
    backend = "reference"
    features: ClassVar = ALL
    everyday = tuple(map(str, FEATURES))


@pytest.mark.usefixtures("cpu_level")
class TestNative(SharingSuite):
    backend = "native"
    write_backend = "native"
    features: ClassVar = ALL + LONG + MORE

    @classmethod
    def takes(cls, feature: Feature) -> bool:
        return feature.dtype in ("float32", "bfloat16") and feature.heads[2] in native.HEAD_SIZES

    def test_it_was_built(self) -> None:
        """The tests install pjax where a compiler is; XLA would serve as well, and nobody would notice."""
        assert library() is not None

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


OPTIONS: list[dict[str, Any]] = [
    {"sinks": "normal"},
    {"sinks": "large", "sliding_window": 20, "logit_softcap": 2.0},
    {"sliding_window": 33, "logit_softcap": 2.0, "scale": 0.3, "sinks": "normal"},
]


@pytest.mark.parametrize("are_arrays", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("case", ["decode", "mixed", "chunk", "padding"])
@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_sinks_and_options_that_are_arrays(backend: str, case: str, options: dict[str, Any], are_arrays: bool) -> None:
    """Sinks of a head apart; as large as logits, or so large that they take nearly all of the softmax."""
    sinks = np.random.default_rng(5).standard_normal(6).astype(np.float32) * {"normal": 2, "large": 30}[options["sinks"]]
    step = make_step(Feature(case, (6, 2, 16), 8, options=options | {"sinks": sinks}))
    given = {
        name: jnp.asarray(value, jnp.result_type(type(value))) if are_arrays else value
        for name, value in options.items()
        if name != "sinks"
    }

    def run(q: jax.Array, pool: jax.Array, given: dict[str, Any]) -> jax.Array:
        numbers = given if are_arrays else {name: value for name, value in options.items() if name != "sinks"}
        return paged_attention(q, pool, step.batch, num_kv_heads=2, backend=backend, sinks=jnp.asarray(sinks), **numbers)

    out = jax.jit(run)(step.q, jnp.asarray(step.pool_after), given)
    np.testing.assert_allclose(np.asarray(out, np.float64), step.expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_arrays_that_mean_none(backend: str) -> None:
    step = make_step(Feature("mixed", (4, 2, 16), 8))
    none = {"sliding_window": jnp.int32(2**30), "logit_softcap": jnp.float32(jnp.inf)}
    out = paged_attention(step.q, jnp.asarray(step.pool_after), step.batch, num_kv_heads=2, backend=backend, **none)
    np.testing.assert_allclose(np.asarray(out, np.float64), step.expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", ["native", "tpu", "triton", "mosaic_gpu"])
def test_backends_refuse_by_name_what_they_do_not_apply(backend: str) -> None:
    """By default what they don't take goes through XLA."""
    step = make_step(Feature("one", (4, 2, 64), 16))
    sinks = {"sinks": jnp.zeros(4)}
    for options, what in (
        (sinks, "no sinks"),
        ({"sliding_window": jnp.int32(3)}, "sliding_window as a number, not as an array"),
        ({"logit_softcap": jnp.float32(3), "scale": jnp.float32(1)} | sinks, "scale and logit_softcap as a number, not as an array"),
    ):
        with pytest.raises(NotImplementedError, match=f"attention backend '{backend}' takes {what}; 'xla' takes any"):
            paged_attention(step.q, step.pool, step.batch, num_kv_heads=2, backend=backend, **options)
        pool = jnp.asarray(step.pool_after)
        out, wanted = (paged_attention(step.q, pool, step.batch, num_kv_heads=2, backend=name, **options) for name in (None, "xla"))
        np.testing.assert_array_equal(out, wanted)


@pytest.fixture(scope="module")
def one() -> Step:
    return make_step(Feature("one", (4, 2, 16), 8))


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
        ({"sliding_window": np.array([3])}, r"sliding_window is array\(\[3\]\), but must be an integer"),
        ({"sliding_window": jnp.ones(2, jnp.int32)}, r"sliding_window is int32\[2\], but must be a number or int32\[\]"),
        ({"logit_softcap": jnp.int32(2)}, r"logit_softcap is int32\[\], but must be a number or float32\[\]"),
        ({"scale": jnp.ones(4)}, r"scale is float32\[4\], but must be a number or float32\[\]"),
        ({"sinks": jnp.ones(2)}, r"sinks is float32\[2\], but must be floating \[4\], one for each query head"),
        ({"sinks": 1.0}, r"sinks is 1\.0, but must be floating \[4\]"),
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
