"""Penalties, rules and typical_p in the sampler: against float64 numpy and transformers' own logits processors."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from pjax.params import LogitRules, SamplingParams
from pjax.sampling.adjust import adjust_logits, needs_adjusting
from pjax.sampling.filters import filter_logits
from pjax.sampling.parameters import SamplingTable, flags_of
from pjax.sampling.processors import check_processors
from pjax.sampling.token_rules import as_row, empty_tables, write_row
from tests.budget import examples
from tests.sampling.reference_sampler import Row, adjusted, typical
from tests.sampling.test_sampler import check_frequencies, log, make_params, run, softmax

VOCAB, TABLE_ROWS, LENGTH = 75, 6, 300  # 75 tokens are no whole number of words of bits

_adjust = jax.jit(lambda logits, positions, packed, tables, tokens: adjust_logits(logits, positions, packed.unpack(), tables, tokens))
_needed = jax.jit(lambda positions, packed: needs_adjusting(positions, packed.unpack()))


def params_of(row: Row) -> SamplingParams:
    return SamplingParams(
        max_tokens=None,
        repetition_penalty=row.repetition,
        presence_penalty=row.presence,
        frequency_penalty=row.frequency,
        min_tokens=row.min_tokens,
    )


def rules_of(row: Row) -> LogitRules:
    return LogitRules(
        allowed=None if row.allowed is None else frozenset(row.allowed),
        banned=frozenset(words[0] for words in row.bad if len(words) == 1),
        stops=frozenset(row.stops),
        bias=tuple(row.bias.items()),
        bad_sequences=tuple(tuple(words) for words in row.bad if len(words) > 1),
    )


def adjust(logits: np.ndarray, rows: list[Row], places: list[int], *, needed: bool | None = None) -> np.ndarray:
    """The device's own, for rows that lie at these places of the tables; all else there is rubbish."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (TABLE_ROWS, LENGTH)).astype(np.int32)
    table, tables = SamplingTable(TABLE_ROWS), empty_tables(TABLE_ROWS, VOCAB)
    for row, place in zip(rows, places, strict=True):
        rules = rules_of(row)
        length = len(row.prompt) + len(row.output)
        tokens[place, :length] = row.prompt + row.output
        table.set(place, row, params_of(row), 0, prompt_len=len(row.prompt), flags=flags_of(rules, []))
        tables = write_row(tables, np.int32(place), as_row(rules, VOCAB))
    positions = np.array([len(row.prompt) + len(row.output) for row in rows], np.int32)
    packed = table.gather(np.array(places, np.int32), len(rows))
    if needed is not None:
        assert bool(_needed(positions, packed)) == needed
    return np.asarray(_adjust(logits.astype(np.float32), positions, packed, tables, tokens))


def check(logits: np.ndarray, rows: list[Row], places: list[int]) -> None:
    out = adjust(logits, rows, places)
    for got, before, row in zip(out, logits, rows, strict=True):
        np.testing.assert_allclose(got, adjusted(before.astype(np.float32), row), rtol=2e-6, atol=2e-5)


ids = st.integers(0, VOCAB - 1)
few = st.integers(0, 3)  # tokens so few that sequences of them come again


@st.composite
def a_row(draw: st.DrawFn) -> Row:
    seed, size = draw(st.integers(0, 999)), draw(st.sampled_from([1, 7, 129, 200]))
    prompt = np.random.default_rng(seed).integers(0, VOCAB, size).tolist()
    return Row(
        prompt,
        draw(st.lists(few, max_size=30)),
        repetition=draw(st.sampled_from([1.0, 1.3, 0.5, 10.0])),
        presence=draw(st.sampled_from([0.0, 2.0, -1.5])),
        frequency=draw(st.sampled_from([0.0, 0.25, -2.0])),
        allowed=draw(st.none() | st.lists(ids, min_size=1, max_size=60)),
        bias=draw(st.dictionaries(ids, st.floats(-100, 100, width=32), max_size=VOCAB)),
        bad=draw(st.lists(st.lists(few, min_size=2, max_size=16), max_size=8)),
        stops=draw(st.lists(ids, max_size=5)),
        min_tokens=draw(st.sampled_from([0, 0, 1, 20])),
    )


@given(rows=st.lists(a_row(), min_size=4, max_size=4), places=st.permutations(range(TABLE_ROWS)), seed=st.integers(0, 99))
@settings(max_examples=examples(100), deadline=None)
def test_mixed_batches_as_float64_numpy(rows: list[Row], places: list[int], seed: int) -> None:
    check(np.random.default_rng(seed).standard_normal((4, VOCAB)) * 5, rows, places[:4])


@given(rows=st.lists(a_row(), min_size=4, max_size=4), places=st.permutations(range(TABLE_ROWS)))
@settings(max_examples=examples(40), deadline=None)
def test_a_row_does_not_depend_on_the_others(rows: list[Row], places: list[int]) -> None:
    logits = (np.random.default_rng(1).standard_normal((4, VOCAB)) * 5).astype(np.float32)
    together = adjust(logits, rows, places[:4])
    plain = Row([1], [])
    for index, row in enumerate(rows):
        alone = adjust(np.tile(logits[index], (4, 1)), [row, plain, plain, plain], places[2:6])
        assert np.array_equal(alone[0], together[index], equal_nan=True)
        assert np.array_equal(alone[1], logits[index]), "who asks for nothing keeps the very logits"


def test_a_batch_that_asks_for_nothing_needs_no_adjusting() -> None:
    logits = np.zeros((4, VOCAB))
    plain = [Row([1, 2], [3]) for _ in range(4)]
    adjust(logits, plain, [0, 1, 2, 3], needed=False)
    over = [Row([1, 2], [3, 4], stops=[5], min_tokens=2), *plain[1:]]
    adjust(logits, over, [0, 1, 2, 3], needed=False)
    for change in ({"presence": 1.0}, {"allowed": [1]}, {"bias": {1: 1.0}}, {"bad": [[1, 2]]}, {"stops": [5], "min_tokens": 2}):
        adjust(logits, [Row([1, 2], [3], **change), *plain[1:]], [0, 1, 2, 3], needed=True)


def test_where_bad_sequences_leave_nothing_they_do_not_count() -> None:
    row = Row([1], [3], allowed=[5], bad=[[3, 5]])
    out = adjust(np.zeros((4, VOCAB)), [row] * 4, [0, 1, 2, 3])
    assert np.flatnonzero(out[0] > -np.inf).tolist() == [5]


def test_a_bad_sequence_that_the_prompt_begins_is_allowed() -> None:
    out = adjust(
        np.zeros((4, VOCAB)), [Row([1, 2], [], bad=[[2, 3]]), Row([1], [2], bad=[[2, 3]]), Row([1], []), Row([1], [])], [3, 2, 1, 0]
    )
    assert (out[:, 3] == -np.inf).tolist() == [False, True, False, False], "as in vLLM: only what was generated counts"


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty_as_transformers(penalty: float) -> None:
    rng = np.random.default_rng(2)
    logits = (rng.standard_normal((4, VOCAB)) * 4).astype(np.float32)
    rows = [Row(rng.integers(0, VOCAB, 9).tolist(), rng.integers(0, VOCAB, 6).tolist(), repetition=penalty) for _ in range(4)]
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    history = torch.tensor([row.prompt + row.output for row in rows])
    np.testing.assert_allclose(adjust(logits, rows, [3, 0, 5, 1]), theirs(history, torch.tensor(logits)).numpy(), rtol=1e-6)


def test_bad_words_and_min_tokens_as_transformers() -> None:
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((4, VOCAB)) * 4).astype(np.float32)
    bad = [[4], [1, 2], [2, 1], [1, 2, 3], [0, 0, 0]]
    rows = [Row([70, 71], rng.integers(0, 4, 8).tolist(), bad=bad, stops=[6, 7], min_tokens=9) for _ in range(4)]
    history = torch.tensor([row.prompt + row.output for row in rows])
    out = transformers.NoBadWordsLogitsProcessor(bad)(history, torch.tensor(logits))
    out = transformers.MinNewTokensLengthLogitsProcessor(2, 9, [6, 7])(history, out)
    assert np.array_equal(adjust(logits, rows, [3, 0, 5, 1]), out.numpy())


# ---- typical_p


@pytest.mark.parametrize("mass", [0.01, 0.2, 0.5, 0.9, 0.99])
def test_typical_p_as_numpy_and_transformers(mass: float) -> None:
    rng = np.random.default_rng(int(mass * 100))
    logits = (rng.standard_normal((64, 200)) * rng.choice([0.5, 2, 5], (64, 1))).astype(np.float32)
    logits[::4, :150] = -np.inf
    ours = np.asarray(jax.jit(filter_logits)(logits, make_params(64, typical_p=mass))) > -np.inf
    theirs = transformers.TypicalLogitsWarper(mass)(None, torch.tensor(logits)).numpy() > -np.inf
    live = logits > -np.inf
    same = (ours == theirs & live).all(axis=1)
    exact = np.array(
        [set(np.flatnonzero(row).tolist()) == typical(x.astype(np.float64), mass) for row, x in zip(ours, logits, strict=True)]
    )
    assert same.mean() > 0.95 and exact.mean() > 0.95, "all but those whose sum of probabilities meets the bound within rounding"
    assert ours.any(axis=1).all()


def test_typical_p_of_what_top_k_leaves() -> None:
    p = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    out = np.asarray(jax.jit(filter_logits)(log([p]), make_params(1, top_k=3, typical_p=0.2)))[0]
    left = np.where(np.arange(5) < 3, np.log(p), -np.inf)
    assert set(np.flatnonzero(out > -np.inf).tolist()) == typical(left, 0.2)


def test_frequencies_of_typical_p() -> None:
    logits = log([0.45, 0.25, 0.15, 0.1, 0.05])
    p = np.where([token in typical(logits.astype(np.float64), 0.6) for token in range(5)], softmax(logits), 0)
    assert 1 < (p > 0).sum() < 5
    check_frequencies(run(np.tile(logits, (8192, 1)), typical_p=0.6).tokens, p / p.sum())


# ---- logits processors


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (lambda logits, tokens, lengths: logits[:, :-1], r"gives float32\[2, 9\], but must give float32\[2, 10\]"),
        (lambda logits, tokens, lengths: logits > 0, "gives bool"),
        (lambda logits, tokens, lengths: float(logits[0, 0]), "can't be traced for 2 rows"),
        (lambda logits: logits, "can't be traced for 2 rows"),
        (lambda logits, tokens, lengths: None, "gives None"),
    ],
)
def test_wrong_logits_processors_are_refused(process: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_processors({"wrong": process}, [2, 4], 8, 10)
