"""Rows from which no token can be sampled: they say so, and every other row of the step gets the token that it gets alone."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from pjax.params import LogitRules, SamplingParams
from pjax.sampling.parameters import SamplingTable, flags_of
from pjax.sampling.program import SampleInput, make_sample
from pjax.sampling.sampler import NO_TOKEN
from pjax.sampling.token_rules import as_row, empty_tables, write_row
from pjax.sampling.vocabulary import NOT_FINITE
from tests.sampling.test_sampler import run

VOCAB = 300
BAD = {"nan": np.nan, "inf": np.inf, "nothing": -np.inf}


def spoil(logits: np.ndarray, kind: str, rows: Any) -> np.ndarray:
    """With one token's logit NaN or +inf in these rows, or all of them -inf."""
    spoiled = logits.copy()
    spoiled[rows, slice(None) if kind == "nothing" else 123] = BAD[kind]
    return spoiled


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize(
    "columns",
    [
        {"temperature": 0},
        {"temperature": 1},
        {"temperature": 1, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9},
        {"temperature": 0, "num_logprobs": 0},
        {"temperature": np.tile([0, 1, 0.5], 7), "num_logprobs": np.tile([-1, 0, 1], 7)},
    ],
    ids=str,
)
def test_a_bad_row_gets_no_token_and_its_neighbours_get_theirs(kind: str, columns: dict[str, Any]) -> None:
    logits = np.random.default_rng(0).standard_normal((21, VOCAB)).astype(np.float32) * 3
    bad = np.array([0, 3, 8, 16, 20])
    clean, found = run(logits, **columns), run(spoil(logits, kind, bad), **columns)
    assert (clean.tokens >= 0).all() and (found.tokens[bad] == NOT_FINITE).all()
    for name in ("tokens", "logprobs", "ranks", "top_tokens", "top_logprobs"):
        np.testing.assert_array_equal(np.delete(getattr(found, name), bad, axis=0), np.delete(getattr(clean, name), bad, axis=0))


def only_last(logits: jax.Array, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Leaves the last token."""
    return logits.at[:, :-1].set(-jax.numpy.inf)


def nothing(logits: jax.Array, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Leaves no token."""
    return jax.numpy.full_like(logits, -jax.numpy.inf)


def broken(logits: jax.Array, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Divides zero by zero."""
    return logits / (logits - logits)


PROCESSORS = (only_last, nothing, broken)


def sampled(logits: np.ndarray, rows: list[tuple[SamplingParams, LogitRules | None, list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """The token table after a step of these rows, each with parameters, rules and processors by number; and their tokens."""
    count = len(rows)
    table, tables = SamplingTable(count), empty_tables(count, VOCAB)
    for row, (params, rules, processors) in enumerate(rows):
        table.set(row, object(), params, row, prompt_len=3, flags=flags_of(rules, processors))
        if rules is not None:
            tables = write_row(tables, np.int32(row), as_row(rules, VOCAB))
    places = np.arange(count, dtype=np.int32)
    inputs = SampleInput(places, np.full(count, 3, np.int32), np.int32(count), table.gather(places, count), tables)  # type: ignore[arg-type]
    after, made = jax.jit(make_sample(1, processors=PROCESSORS))(logits, np.full((count, 8), 77, np.int32), inputs)
    return np.asarray(after), np.asarray(made.tokens)


@pytest.mark.parametrize("temperature", [0, 1])
def test_what_the_request_asked_for_may_leave_no_token(temperature: float) -> None:
    """-inf of the model where all others are forbidden; processors that leave nothing or make NaN; NaN of the model that a rule hides."""
    params = SamplingParams(temperature=temperature, max_tokens=None)
    logits = np.random.default_rng(1).standard_normal((8, VOCAB)).astype(np.float32)
    logits[1, [5, 6]] = -np.inf
    logits[4:6, 9] = np.nan, np.inf
    logits[7, 5] = -np.inf
    rows: list[tuple[SamplingParams, LogitRules | None, list[int]]] = [
        (params, None, []),
        (params, LogitRules(allowed=frozenset({5, 6})), []),
        (params, None, [1]),
        (params, None, [2]),
        (params, LogitRules(banned=frozenset({9})), []),
        (params, None, [0]),
        (params, None, [0]),
        (params, LogitRules(allowed=frozenset({5, 6}), bad_sequences=((77, 6),)), []),  # left out where nothing else is left
    ]
    table, tokens = sampled(logits, rows)
    plain = sampled(logits[:1], rows[:1])[1]
    assert tokens.tolist() == [plain[0], NO_TOKEN, NO_TOKEN, NO_TOKEN, NOT_FINITE, NOT_FINITE, VOCAB - 1, 6]
    assert (table[:, 3] == np.maximum(tokens, 0)).all(), "the step under way reads a token of the vocabulary"
    assert (np.delete(table, 3, axis=1) == 77).all()


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1, 1e30])
def test_beams_log_probabilities_as_float64(temperature: float) -> None:
    """Logits are far from 0, and their quotients by 1e-30 are beyond float32."""
    logits = (np.random.default_rng(2).standard_normal((6, VOCAB)) * 4 + [[0], [1e3], [-1e3], [1e9], [-1e9], [30]]).astype(np.float32)
    logits[5, ::2] = -np.inf
    out = run(logits, max_logprobs=8, temperature=0, num_logprobs=0, logprob_temperature=temperature)
    expected = log_softmax(logits.astype(np.float64) / np.float64(np.float32(temperature)))
    order = np.argsort(-expected.astype(np.float32), axis=-1, kind="stable")[:, :8]
    np.testing.assert_array_equal(out.top_tokens, order)
    np.testing.assert_allclose(out.top_logprobs, np.take_along_axis(expected, order, axis=-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out.tokens, logits.argmax(axis=-1))


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-39, 1e39, 1e300])
def test_temperatures_beyond_float32_are_the_nearest_that_it_has(temperature: float) -> None:
    """Greedy then, or equally likely tokens, but never a forbidden one."""
    params = SamplingParams(temperature=temperature, max_tokens=None)
    logits = np.random.default_rng(3).standard_normal((64, VOCAB)).astype(np.float32)
    allowed = [4, 100, 250]
    _, tokens = sampled(logits, [(params, LogitRules(allowed=frozenset(allowed)), [])] * 64)
    if temperature < 1:
        assert tokens.tolist() == [allowed[place] for place in logits[:, allowed].argmax(axis=1)]
    else:
        assert set(tokens.tolist()) == set(allowed)
    table = SamplingTable(1)
    table.set(0, object(), SamplingParams(temperature=0), 0, temperature)
    beams = table.floats[0, -1]
    out = run(logits[:4], max_logprobs=VOCAB, temperature=0, num_logprobs=0, logprob_temperature=beams)
    assert np.isfinite(out.logprobs).all() and not np.isnan(out.top_logprobs).any()
    np.testing.assert_allclose(out.logprobs, 0 if temperature < 1 else -np.log(VOCAB), rtol=1e-6)
