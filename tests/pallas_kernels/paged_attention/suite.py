"""The tests that every backend of paged attention inherits: a step's write and attention, against float64 numpy.

Every slot that no row owns holds NaN, and so does the tail of each last page; the pool is compared after the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax.pallas_kernels import RaggedBatch, paged_attention, pool_shape
from pjax.pallas_kernels.kv_write import write_targets

# (query tokens, tokens in the cache after the step) of each row, decode rows first; packed tokens; rows
CASES = {
    "decode": ([(1, 1), (1, 5), (1, 64), (1, 65), (1, 200), (1, 17), (1, 129), (1, 2), (1, 31), (1, 300)], 10, 10),
    "one": ([(1, 77)], 1, 1),
    "few": ([(1, 1000), (1, 33), (1, 70)], 3, 3),
    "prefill": ([(150, 150)], 160, 4),
    "chunk": ([(37, 190), (64, 64), (3, 258)], 128, 4),
    "mixed": ([(1, 40), (1, 3), (1, 129), (70, 70), (2, 2), (5, 140), (65, 201)], 160, 12),
    "padding": ([], 16, 4),
    "long": ([(1, 5000), (600, 3000)], 640, 2),
    "narrow": ([(1, 9), (3, 20)], 8, 8),
}
PADDED_TOKENS, PADDED_ROWS = 160, 12
PADDED_LENGTH = 300  # of a sequence: the reference reads a table's whole width for every token
PADDED_CASES = {
    name: rows
    for name, (rows, num_tokens, num_rows) in CASES.items()
    if num_tokens <= PADDED_TOKENS and num_rows <= PADDED_ROWS and all(kv_len <= PADDED_LENGTH for _, kv_len in rows)
}


@dataclass(frozen=True)
class Feature:
    """One set of arguments."""

    case: str
    heads: tuple[int, int, int]  # N, K, H
    page_size: int
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    is_padded: bool = False
    """Whether packed tokens, rows, pages and tables are as many as the largest such case has, so that cases share one program."""

    def __str__(self) -> str:
        options = [f"{name}={value}" for name, value in self.options.items()]
        padded = ["padded"] if self.is_padded else []
        return "-".join([*padded, self.case, "N{}_K{}_H{}".format(*self.heads), f"G{self.page_size}", self.dtype, *options])


FEATURES = [
    Feature("decode", (9, 3, 64), 16),
    Feature("mixed", (9, 3, 64), 16, options={"sliding_window": 70}),
    Feature("mixed", (4, 2, 80), 8, options={"sliding_window": 33, "logit_softcap": 2.0}),
    Feature("chunk", (4, 1, 256), 128, options={"scale": 0.3}),
    Feature("prefill", (2, 2, 96), 32),
    Feature("one", (8, 1, 112), 64, options={"logit_softcap": 5.0}),
    Feature("few", (9, 3, 64), 16),
    Feature("few", (4, 2, 128), 16, options={"sliding_window": 70}),
    Feature("padding", (4, 4, 128), 16),
    Feature("narrow", (4, 1, 128), 8, options={"sliding_window": 1}),
    Feature("mixed", (4, 2, 128), 16, "bfloat16"),
    Feature("mixed", (6, 2, 64), 16, "bfloat16", {"sliding_window": 70}),
    Feature("decode", (8, 2, 80), 8, "bfloat16"),
    Feature("chunk", (2, 2, 96), 64, "bfloat16", {"logit_softcap": 2.0}),
    Feature("decode", (2, 1, 256), 16, "bfloat16"),
    Feature("mixed", (4, 4, 64), 32, "float16"),
    Feature("decode", (4, 1, 128), 128, "float16"),
]


@dataclass
class Step:
    """A step's arguments and what has to come out."""

    q: jax.Array  # [T, N, H]
    keys: jax.Array  # [T, K, H], the step's own
    values: jax.Array
    pool: jax.Array  # before the step
    batch: RaggedBatch
    pool_after: np.ndarray
    expected: np.ndarray  # float64 [T, N, H]; zero for padding


def make_step(feature: Feature, *, seed: int = 0) -> Step:
    """Pages in random order; page 0 and the last one stay unowned, and unused table entries point to page 0."""
    rows, num_tokens, num_rows = CASES[feature.case]
    num_heads, num_kv_heads, head_size = feature.heads
    page_size, dtype = feature.page_size, jnp.dtype(feature.dtype)
    rng = np.random.default_rng(seed)
    is_decode = feature.case == "decode"
    if feature.is_padded:
        num_tokens, num_rows = (PADDED_ROWS if is_decode else PADDED_TOKENS), PADDED_ROWS
    sized = list(PADDED_CASES.values()) if feature.is_padded else [rows]
    num_pages = max(sum(-(-kv // page_size) for _, kv in some) for some in sized) + 3
    order = rng.permutation(num_pages - 2) + 1
    longest = max((kv_len for some in sized for _, kv_len in some), default=0)
    tables = np.zeros((num_rows, max(longest, 300) // page_size + 2), np.int32)
    row_starts, kv_lens = np.zeros(num_rows + 1, np.int32), np.zeros(num_rows, np.int32)
    width = num_kv_heads * head_size
    before = np.full((num_pages * page_size, 2 * width), np.nan, dtype)
    after = before.copy()
    q = rng.standard_normal((num_tokens, num_heads, head_size)).astype(dtype)
    own = rng.standard_normal((num_tokens, 2, num_kv_heads, head_size)).astype(dtype)
    expected = np.zeros(q.shape)
    for row, (count, kv_len) in enumerate(rows):
        num, start = -(-kv_len // page_size), row_starts[row]
        tables[row, :num], order = order[:num], order[num:]
        row_starts[row + 1], kv_lens[row] = start + count, kv_len
        kv = rng.standard_normal((kv_len, 2, num_kv_heads, head_size)).astype(dtype)
        kv[kv_len - count :] = own[start : start + count]
        slots = tables[row, np.arange(kv_len) // page_size] * page_size + np.arange(kv_len) % page_size
        after[slots] = kv.reshape(kv_len, -1)
        before[slots[: kv_len - count]] = after[slots[: kv_len - count]]
        expected[start : start + count] = attend_in_float64(q[start : start + count], kv, **feature.options)
    row_starts[len(rows) + 1 :] = row_starts[len(rows)]
    num_decode = next((i for i, (count, _) in enumerate(rows) if count != 1), len(rows))
    arrays = (jnp.asarray(a) for a in (row_starts, kv_lens, tables, np.int32(num_decode)))
    batch = RaggedBatch(*arrays, decode_only=is_decode)
    shape = pool_shape(1, num_pages, page_size, num_kv_heads, head_size)
    return Step(
        q=jnp.asarray(q), keys=jnp.asarray(own[:, 0]), values=jnp.asarray(own[:, 1]), batch=batch, expected=expected,
        pool=jnp.asarray(before.reshape(shape)), pool_after=after.reshape(shape),
    )  # fmt: skip


def attend_in_float64(
    q: np.ndarray,
    kv: np.ndarray,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    logit_softcap: float | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """The last tokens q [C, N, H] of a sequence with keys and values [S, 2, K, H], one token and one head at a time."""
    queries, keys, values = (x.astype(np.float64) for x in (q, kv[:, 0], kv[:, 1]))
    out, ratio = np.zeros(queries.shape), q.shape[1] // kv.shape[2]
    for index, position in enumerate(range(len(kv) - len(q), len(kv))):
        first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        for head in range(q.shape[1]):
            logits = keys[first : position + 1, head // ratio] @ queries[index, head] * (scale or q.shape[2] ** -0.5)
            if logit_softcap is not None:
                logits = logit_softcap * np.tanh(logits / logit_softcap)
            top = logits.max() if sinks is None else max(logits.max(), sinks[head])
            weights = np.exp(logits - top)
            total = weights.sum() + (0 if sinks is None else np.exp(float(sinks[head]) - top))
            out[index, head] = weights / total @ values[first : position + 1, head // ratio]
    return out


class KernelSuite:
    """A backend's class sets `backend`, and `takes`."""

    backend: ClassVar[str]
    write_backend: ClassVar[str] = "xla"
    features: ClassVar[Sequence[Feature]] = FEATURES

    @classmethod
    def takes(cls, feature: Feature) -> bool:
        """Whether the backend serves it; else it must refuse it by name."""
        return True

    def attend(self, q: jax.Array, pool: jax.Array, batch: RaggedBatch, **options: Any) -> jax.Array:
        """Traced under jit."""
        return paged_attention(q, pool, batch, backend=self.backend, **options)

    def write(self, pool: jax.Array, keys: jax.Array, values: jax.Array, batch: RaggedBatch) -> jax.Array:
        """Traced under jit, with the pool donated."""
        return write_targets(batch, pool, keys.shape[0], backend=self.write_backend).write(pool, keys, values, 0)

    everyday: ClassVar[Sequence[str] | None] = None
    """Beginnings of the names of the features that `make test` tries; None: all of them. `make test-all` tries every one."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "feature" in metafunc.fixturenames:
            taken, everyday = [feature for feature in self.features if self.takes(feature)], self.everyday
            rare = [everyday is not None and not str(feature).startswith(tuple(everyday)) for feature in taken]
            assert not all(rare), f"make test tries no feature of {type(self).__name__}"
            marks = [pytest.mark.extended if is_rare else () for is_rare in rare]
            metafunc.parametrize("feature", [pytest.param(f, id=str(f), marks=mark) for f, mark in zip(taken, marks, strict=True)])

    def program(self, feature: Feature) -> Any:
        """A step, jitted: (pool, which is donated, q, keys, values, batch) -> (out, pool)."""

        def run(pool: jax.Array, q: jax.Array, keys: jax.Array, values: jax.Array, batch: RaggedBatch) -> tuple[jax.Array, jax.Array]:
            pool = self.write(pool, keys, values, batch)
            return self.attend(q, pool, batch, num_kv_heads=feature.heads[1], **feature.options), pool

        return jax.jit(run, donate_argnums=0)

    def run(self, feature: Feature) -> None:
        """A step, its write included, against what is expected; the pool is donated."""
        step = make_step(feature)
        out, pool = self.program(feature)(step.pool, step.q, step.keys, step.values, step.batch)
        assert out.dtype == step.q.dtype
        got = np.asarray(out, np.float64)
        if feature.dtype == "float32":
            np.testing.assert_allclose(got, step.expected, atol=2e-5, rtol=2e-5)
        else:  # of each head's vector, its length
            assert (np.linalg.norm(got - step.expected, axis=-1) <= 1e-2 * np.linalg.norm(step.expected, axis=-1)).all()
        np.testing.assert_array_equal(np.asarray(pool, np.float32), step.pool_after.astype(np.float32))

    def test_a_step_matches_float64_and_touches_only_its_slots(self, feature: Feature) -> None:
        self.run(feature)

    def test_what_it_does_not_take_is_refused_by_name(self) -> None:
        for feature in self.features:
            if not self.takes(feature):
                step = make_step(feature)
                with pytest.raises(NotImplementedError, match=f"'{self.backend}' takes .*'xla' takes any"):
                    paged_attention(step.q, step.pool, step.batch, num_kv_heads=feature.heads[1], backend=self.backend, **feature.options)
