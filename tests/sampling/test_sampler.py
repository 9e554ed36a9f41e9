"""The sampler against float64 numpy: what the filters keep, how often each token is drawn, on what a draw depends."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from pjax.sampling.filters import filter_logits
from pjax.sampling.parameters import SamplingArrays
from pjax.sampling.sampler import Sampled, sample

VOCABS = (1, 2, 5, 255, 256, 257, 1000)
P = np.array([0.4, 0.3, 0.2, 0.1])
TIED = np.array([0.2, 0.3, 0.2, 0.3])
DRAWS = 8192  # the same shapes in many tests: compiling takes longer than running
NEAR = 1e-5  # probabilities this near to a bound may fall on either side of it

_filter = jax.jit(filter_logits)
_sample = jax.jit(sample, static_argnums=3)


def make_params(rows: int, **columns: Any) -> SamplingArrays:
    """Temperature 1 and nothing else, where not said otherwise; row i has seed i."""
    defaults = {
        "temperature": 1,
        "top_k": 0,
        "top_p": 1,
        "min_p": 0,
        "seed": np.stack([np.zeros(rows), np.arange(rows)], 1),
        "num_logprobs": -1,
        "logprob_temperature": 1,
        "typical_p": 1,
        "repetition_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "rows": np.arange(rows),
        "prompt_lens": 0,
        "min_lens": 0,
        "flags": 0,
    }
    types = dict.fromkeys(("top_k", "num_logprobs", "rows", "prompt_lens", "min_lens", "flags"), np.int32) | {"seed": np.uint32}
    arrays: dict[str, Any] = {}
    for name, value in (defaults | columns).items():
        shape = (rows, 2) if name == "seed" else (rows,)
        arrays[name] = np.broadcast_to(np.asarray(value), shape).astype(types.get(name, np.float32))
    return SamplingArrays(**arrays)


def run(logits: Any, positions: Any = 7, max_logprobs: int = 1, **columns: Any) -> Sampled:
    logits = np.atleast_2d(np.asarray(logits, np.float32))
    positions = np.broadcast_to(np.asarray(positions, np.int32), logits.shape[:1])
    return jax.device_get(_sample(logits, positions, make_params(len(logits), **columns), max_logprobs))


def log(probabilities: Any) -> Any:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probabilities, np.float64)).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# ---- which tokens stay


def kept(logits: np.ndarray, min_p: float, top_k: int, top_p: float) -> np.ndarray:
    """The definition, one row: min_p, then top_k, then top_p of what is left; of equal tokens all stay or none."""
    p = softmax(logits)
    keep = p >= min_p * p.max()
    if 0 < top_k < keep.sum():
        keep &= logits >= np.sort(logits[keep])[-top_k]
    if top_p < 1:
        p = np.where(keep, p, 0) / p[keep].sum()
        keep &= logits >= max(least for least in logits[keep] if p[logits >= least].sum() >= top_p)
    return keep


@pytest.mark.parametrize(
    ("p", "columns", "expected"),
    [
        (P, {}, [0, 1, 2, 3]),
        (P, {"top_k": 1}, [0]),
        (P, {"top_k": 3}, [0, 1, 2]),
        (P, {"top_k": 4}, [0, 1, 2, 3]),
        (P, {"top_k": 2**31 - 1}, [0, 1, 2, 3]),
        (TIED, {"top_k": 1}, [1, 3]),
        (TIED, {"top_k": 2}, [1, 3]),
        (TIED, {"top_k": 3}, [0, 1, 2, 3]),
        (P, {"top_p": 1e-6}, [0]),
        (P, {"top_p": 0.39}, [0]),
        (P, {"top_p": 0.41}, [0, 1]),
        (P, {"top_p": 0.69}, [0, 1]),
        (P, {"top_p": 0.89}, [0, 1, 2]),
        (P, {"top_p": 0.91}, [0, 1, 2, 3]),
        (TIED, {"top_p": 0.1}, [1, 3]),
        (TIED, {"top_p": 0.61}, [0, 1, 2, 3]),
        (P, {"min_p": 0.24}, [0, 1, 2, 3]),
        (P, {"min_p": 0.26}, [0, 1, 2]),
        (P, {"min_p": 0.76}, [0]),
        (P, {"min_p": 1}, [0]),
        (TIED, {"min_p": 1}, [1, 3]),
        (P, {"top_k": 2, "top_p": 0.5}, [0]),  # of the two 0.571 and 0.429; top_p first would keep both
        (P, {"min_p": 0.3, "top_p": 0.75}, [0, 1]),  # of the three 0.444, 0.333, ...; top_p first would keep three
        (P, {"min_p": 0.6, "top_k": 3}, [0, 1]),
        (P, {"min_p": 0.3, "top_k": 2, "top_p": 0.6}, [0, 1]),
        ([0, 0.5, 0, 0.5], {"top_k": 3, "top_p": 0.99}, [1, 3]),
    ],
)
def test_filters_on_four_tokens(p: Any, columns: dict[str, float], expected: list[int]) -> None:
    logits = log([p])
    filtered = np.asarray(_filter(logits, make_params(1, **columns)))[0]
    assert np.flatnonzero(filtered > -np.inf).tolist() == expected
    assert (filtered[expected] == logits[0, expected]).all()
    limits = {"min_p": 0.0, "top_k": 0, "top_p": 1.0} | columns
    assert np.flatnonzero(kept(logits[0], **limits) & (logits[0] > -np.inf)).tolist() == expected, "the definition itself"


def make_logits(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """Rows of several kinds: smooth, full of ties, peaked, mostly masked."""
    logits = (rng.standard_normal((rows, vocab)) * 3).astype(np.float32)
    logits[1::4] = np.round(logits[1::4])
    logits[2::4] *= 10
    logits[3::4] = np.where(rng.random(logits[3::4].shape) < 0.7, -np.inf, logits[3::4])
    logits[3::4, rng.integers(vocab)] = 0
    return logits


@pytest.mark.parametrize("vocab", VOCABS)
def test_filters_on_random_rows(vocab: int) -> None:
    rows, rng = 240, np.random.default_rng(vocab)
    logits = make_logits(rng, rows, vocab)
    min_p, top_p = (rng.choice(values, rows).astype(np.float32) for values in ([0, 0, 0.01, 0.2, 1], [1, 1, 0.05, 0.5, 0.9, 0.999]))
    top_k = rng.choice([0, 0, 1, 2, 3, 50, vocab - 1, vocab, vocab + 1], rows)
    filtered = np.asarray(_filter(logits, make_params(rows, min_p=min_p, top_k=top_k, top_p=top_p)))
    exact = 0
    for row, out, a, k, b in zip(logits, filtered, min_p.astype(float), top_k, top_p.astype(float), strict=True):
        live = row > -np.inf
        least = kept(row, min(a + NEAR, 1) if a else 0, k, b - NEAR if b < 1 else 1) & live
        most = kept(row, max(a - NEAR, 0), k, b + NEAR) & live
        assert (least <= (out > -np.inf)).all() and ((out > -np.inf) <= most).all()
        assert (out[out > -np.inf] == row[out > -np.inf]).all()
        exact += int((least == most).all())
    assert exact > 0.9 * rows, "the bounds leave nothing open in most rows"


def test_rows_without_filters_are_left_alone_in_the_company_of_others() -> None:
    logits = make_logits(np.random.default_rng(1), 4, 300)
    filtered = np.asarray(_filter(logits, make_params(4, top_k=[0, 5, 0, 0], top_p=[1, 1, 0.3, 1], min_p=[0, 0, 0, 0.5])))
    assert (filtered != logits).any(axis=-1).tolist() == [False, True, True, True]


def test_zero_and_minus_zero_are_a_tie() -> None:
    logits = np.array([[-1, -0.0, 0.0, -2]], np.float32)
    for columns in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 1}):
        filtered = np.asarray(_filter(logits, make_params(1, **columns)))[0]
        assert np.flatnonzero(filtered > -np.inf).tolist() == [1, 2], columns


@pytest.mark.parametrize("top_p", [0.1, 1e-6, 1e-30, 1.2e-38, 1e-40, 1e-45, 1e-60])
def test_however_small_p_is_the_likeliest_token_stays(top_p: float) -> None:
    assert run([1, 3, *[-9] * 298], top_p=top_p).tokens.tolist() == [1]


# ---- which token is drawn


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = np.tile([[0, 2, 1, 2], [-np.inf, -5, -np.inf, -5], [3, 3, 3, 3], [-1, -1, -1, 4]], (50, 1))
    for columns in ({}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}, {"num_logprobs": 0}):
        assert run(logits, temperature=0, **columns).tokens.tolist() == [1, 1, 0, 3] * 50
    mixed = run(logits, temperature=np.tile([0, 0, 100, 0], 50)).tokens.reshape(50, 4)
    assert (mixed[:, [0, 1, 3]] == [1, 1, 3]).all() and set(mixed[:, 2].tolist()) == {0, 1, 2, 3}


def check_frequencies(tokens: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's chi-square: four standard deviations and a little; the seeds are fixed, so this passes always or never."""
    counts = np.bincount(tokens.ravel(), minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities[probabilities > 0] * tokens.size
    assert expected.min() >= 5, "too few draws for this test"
    free = len(expected) - 1
    assert ((counts[probabilities > 0] - expected) ** 2 / expected).sum() <= free + 4 * np.sqrt(2 * free) + 4


@pytest.mark.parametrize("along", ["seeds", "positions"])
@pytest.mark.parametrize(
    ("temperature", "min_p", "top_k", "top_p"),
    [(1, 0, 0, 1), (0.5, 0, 0, 1), (2, 0, 0, 1), (1, 0, 3, 1), (1, 0, 0, 0.6), (1, 0.3, 0, 1), (0.7, 0.01, 4, 0.9), (3, 0, 1, 1)],
)
def test_frequencies(temperature: float, min_p: float, top_k: int, top_p: float, along: str) -> None:
    logits = log([0.05, 0.35, 0.1, 0.3, 0.2])
    columns = {"temperature": temperature, "min_p": min_p, "top_k": top_k, "top_p": top_p}
    where = {"seed": [3, 5], "positions": np.arange(DRAWS)} if along == "positions" else {"positions": 11}
    tokens = run(np.tile(logits, (DRAWS, 1)), **columns, **where).tokens
    scaled = (logits / temperature).astype(np.float32)
    p = np.where(kept(scaled, min_p, top_k, top_p), softmax(scaled), 0)
    check_frequencies(tokens, p / p.sum())


def test_frequencies_over_chunks() -> None:
    logits = np.where(np.arange(600) % 3 == 1, -np.inf, np.sin(np.arange(600)))
    check_frequencies(run(np.tile(logits, (DRAWS, 1))).tokens, softmax(logits))


def test_neighbouring_draws_are_independent() -> None:
    p = np.array([0.3, 0.25, 0.15, 0.1, 0.2])
    seeds, positions = (array.ravel() for array in np.meshgrid(np.arange(64), np.arange(DRAWS // 64), indexing="ij"))
    tokens = run(np.tile(log(p), (DRAWS, 1)), positions, seed=np.stack([seeds // 20, seeds % 20], 1)).tokens.reshape(64, -1)
    for first, second in ((tokens[:, :-1:2], tokens[:, 1::2]), (tokens[:-1:2], tokens[1::2]), (tokens[:32], tokens[:31:-1, ::-1])):
        check_frequencies(first * 5 + second, np.outer(p, p).ravel())


def test_a_draw_depends_on_seed_and_position_only() -> None:
    rows, rng = 42, np.random.default_rng(0)  # more than a block of rows, and the last one overlaps
    logits = make_logits(rng, rows, 300)
    columns = {
        "temperature": np.array([1, 0.7, 2, 1, 0, 1] * 7),
        "top_k": np.array([0, 40, 0, 0, 3, 5] * 7),
        "top_p": np.array([1, 1, 0.9, 1, 0.5, 0.8] * 7),
        "min_p": np.array([0, 0, 0, 0.01, 0, 0.1] * 7),
        "seed": rng.integers(2**32, size=(rows, 2)),
        "num_logprobs": np.array([-1, 2, -1, -1, -1, 0] * 7),
    }
    for start in range(0, 3000, 500):
        positions = start + np.arange(rows) % 5
        out = run(logits, positions, **columns)
        together = out.tokens
        alone = [run(logits[i], positions[i], **{name: column[[i]] for name, column in columns.items()}) for i in range(rows)]
        assert together.tolist() == [one.tokens[0] for one in alone]
        asked = columns["num_logprobs"] >= 0
        for name in ("ranks", "logprobs", "top_tokens"):
            found, expected = getattr(out, name)[asked], np.concatenate([getattr(one, name) for one in alone])[asked]
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        order = rng.permutation(rows)
        moved = run(logits[order], positions[order], **{name: column[order] for name, column in columns.items()}).tokens
        assert moved.tolist() == together[order].tolist()


def test_seeds_and_positions_all_count() -> None:
    flat = np.zeros((256, 1000))
    numbers, zeros = np.arange(256), np.zeros(256, int)
    for seed, position in (((numbers, zeros), 0), ((zeros, numbers), 0), ((zeros, zeros), numbers), ((zeros, zeros), numbers << 20)):
        tokens = run(flat, position, seed=np.stack(seed, 1)).tokens
        assert 200 <= len(set(tokens.tolist())) <= 250, "1000 tokens drawn 256 times: 226 different ones are expected"


# ---- log-probabilities


@pytest.mark.parametrize("vocab", [1, 257, 1000])
def test_logprobs_are_the_models_own(vocab: int) -> None:
    rng, count = np.random.default_rng(vocab), min(20, vocab)
    logits = np.stack([rng.permutation(vocab) * 12 / vocab for _ in range(16)]).astype(np.float32)
    logits[8:] = np.round(logits[8:] / 4) * 4  # ties
    filters = {"temperature": np.arange(16) % 4 * 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1}
    out = run(logits, max_logprobs=count, num_logprobs=[2] + [-1] * 15, **filters)
    expected, rows = np.log(softmax(logits)), np.arange(16)
    chosen = expected[rows, out.tokens]
    np.testing.assert_allclose(out.logprobs, chosen, atol=2e-5)
    assert out.ranks.tolist() == (1 + (logits > logits[rows, out.tokens][:, None]).sum(axis=-1)).tolist()
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :count]
    assert out.top_tokens.tolist() == order.tolist()
    np.testing.assert_allclose(out.top_logprobs, np.take_along_axis(expected, order, axis=-1), atol=2e-5)
    without = run(logits, max_logprobs=count, **filters)
    assert without.tokens.tolist() == out.tokens.tolist() and not without.logprobs.any() and without.top_tokens.shape == (16, count)


# ---- the edges of float32


@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}])
@pytest.mark.parametrize("temperature", [0, 1e-37, 1e-9, 0.01, 1, 100])
@pytest.mark.parametrize("high", [1e30, 3e38, 100])
def test_far_apart_logits_leave_one_choice(high: float, temperature: float, filters: dict[str, float]) -> None:
    logits = np.full((12, 300), -1e30)
    logits[:, 7], logits[:, 270] = high, 0 if high > 100 else -1e30
    out = run(logits, temperature=temperature, num_logprobs=0, **filters)
    assert (out.tokens == 7).all() and (out.ranks == 1).all() and (out.logprobs == 0).all()


@pytest.mark.parametrize("vocab", [5, 600])
def test_equal_logits_are_all_drawn(vocab: int) -> None:
    for value, temperature in ((1e30, 1e-9), (-3e38, 1e-9), (1e30, 1), (-1e30, 100), (0, 1e-37), (-5, 1e30)):
        out = run(np.full((DRAWS, vocab), value), temperature=temperature, top_p=0.5, top_k=1, min_p=0.5)
        check_frequencies(out.tokens, np.full(vocab, 1 / vocab))


def test_a_masked_token_is_never_drawn() -> None:
    logits = make_logits(np.random.default_rng(2), 4, 1000)[[3]].repeat(256, axis=0)
    for columns in ({}, {"temperature": 100}, {"top_k": 999}, {"top_p": 0.999999}, {"min_p": 1e-6}):
        assert (logits[0, run(logits, **columns).tokens] > -np.inf).all()
