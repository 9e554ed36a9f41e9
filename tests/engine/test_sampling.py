"""Penalties, rules, prompt log-probabilities, best_of and logits processors through the whole engine, crowded and preempted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from pjax import LLM, ConfigError, InvalidRequestError, RequestOutput, SamplingParams
from tests.budget import IS_THOROUGH
from tests.engine import common
from tests.engine.common import greedy, ids
from tests.models import hf


def only_even(logits: jax.Array, token_ids: jax.Array, lengths: jax.Array) -> jax.Array:
    return jax.numpy.where(jax.numpy.arange(logits.shape[1]) % 2 == 0, logits, -jax.numpy.inf)


def next_number(logits: jax.Array, token_ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """The number after the newest token: reads the history."""
    rows = jax.numpy.arange(logits.shape[0])
    return logits.at[rows, (token_ids[rows, lengths - 1] + 1) % logits.shape[1]].set(1e4)


OPTIONS = common.OPTIONS | {"logits_processors": {"even": only_even, "next": next_number}}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, hf.make(folder, "Llama")


@pytest.fixture(scope="module")
def crowded(reference: tuple[Path, Any]) -> LLM:
    """Chunks of at most 16 tokens, and pages for three of the longest prompts or so."""
    return hf.load(reference[0])


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(2, hf.VOCAB, rng.integers(1, longest)).tolist() for _ in range(count)]


def by_transformers(model: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    given = torch.tensor([prompt])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count, pad_token_id=0, eos_token_id=1, **options
    )
    return out[0, len(prompt) :].tolist()


def preemptions(outputs: list[RequestOutput]) -> int:
    return sum(output.metrics.num_preemptions for output in outputs)


COMPARED = 12 if IS_THOROUGH else 6
"""Number of a crowd's prompts that transformers continues too."""
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
    ({"min_tokens": 20, "logit_bias": {1: 20.0}}, {"min_new_tokens": 20, "sequence_bias": {(1,): 20.0}}),
    ({"bad_words_ids": [[5], [17], [64], [100, 3]]}, {"bad_words_ids": [[5], [17], [64], [100, 3]]}),
]


@pytest.fixture(scope="module")
def plain_by_transformers(reference: tuple[Path, Any]) -> list[list[int]]:
    """Without any parameter."""
    return [by_transformers(reference[1], prompt, 24) for prompt in prompts(COMPARED)]


@pytest.mark.parametrize(("ours", "theirs"), CASES)
def test_greedy_as_transformers(
    reference: tuple[Path, Any],
    crowded: LLM,
    plain_by_transformers: list[list[int]],
    ours: dict[str, Any],
    theirs: dict[str, Any],
) -> None:
    """Twelve requests at once, beside as many without any such parameter."""
    some = prompts(12)
    plain = SamplingParams(temperature=0, max_tokens=24)
    asked = SamplingParams(temperature=0, max_tokens=24, **ours)
    outputs = crowded.generate(some + some, [asked] * 12 + [plain] * 12, use_tqdm=False)
    assert preemptions(outputs) > 0, "the pool was meant to be too small"
    expected = [by_transformers(reference[1], prompt, 24, **theirs) for prompt in some[:COMPARED]]
    assert [output.outputs[0].token_ids for output in outputs[:COMPARED]] == expected
    assert [output.outputs[0].token_ids for output in outputs[12:][:COMPARED]] == plain_by_transformers
    assert expected != plain_by_transformers


def test_bad_sequences_that_would_come(reference: tuple[Path, Any], crowded: LLM) -> None:
    """Every pair and triple that greedy generation makes is forbidden."""
    for prompt in prompts(6 if IS_THOROUGH else 3):
        made = by_transformers(reference[1], prompt, 12, min_new_tokens=12)
        bad = [made[2:4], made[5:8], made[9:10]]
        output = crowded.generate([prompt], SamplingParams(temperature=0, max_tokens=24, min_tokens=24, bad_words_ids=bad), use_tqdm=False)
        assert output[0].outputs[0].token_ids == by_transformers(reference[1], prompt, 24, min_new_tokens=24, bad_words_ids=bad)


def test_prompt_logprobs_as_torch(reference: tuple[Path, Any], crowded: LLM) -> None:
    some = prompts(12)
    some[3:6] = [some[2] + [7], some[2][:40] + [9, 8], some[2]]  # cached pages are there, and not read
    crowded.generate(some[2:4], SamplingParams(max_tokens=1), use_tqdm=False)
    params = [SamplingParams(n=1 + index % 2 * 2, max_tokens=30, seed=index, prompt_logprobs=index % 4) for index in range(12)]
    outputs = crowded.generate(some, params, use_tqdm=False)
    assert preemptions(outputs) > 0
    for index, (prompt, output) in enumerate(zip(some, outputs, strict=True)):
        assert output.num_cached_tokens == 0 and len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        logprobs = torch.log_softmax(torch.tensor(hf.torch_logits(reference[1], [prompt])[0]), dim=-1).numpy()
        for position, entries in enumerate(output.prompt_logprobs[1:], 1):
            row, token = logprobs[position - 1], prompt[position]
            assert set(entries) == {token, *np.argsort(-row)[: index % 4].tolist()}
            for other, entry in entries.items():
                assert entry.logprob == pytest.approx(row[other], abs=1e-3)
                assert entry.rank == 1 + (row > row[other]).sum()


def test_prompts_preempted_half_way_keep_their_logprobs(folder: Path) -> None:
    llm = LLM(folder, **common.OPTIONS)
    engine, params = llm.engine, SamplingParams(max_tokens=2, seed=0, prompt_logprobs=0)
    prompt = np.random.default_rng(0).integers(0, common.VOCAB, 80).tolist()
    expected = llm.generate([prompt], params, use_tqdm=False)[0]
    for steps in (1, 2):
        engine.add_request(prompt, params, "one")
        for _ in range(steps):
            assert not any(output.finished for output in engine.step())
        engine._end_steps()
        engine.scheduler.preempt_all()
        outputs: list[RequestOutput] = []
        while engine.has_unfinished_requests:
            outputs = engine.step() or outputs
        got = outputs[-1]
        assert got.metrics.num_preemptions == 1 and got.outputs[0].token_ids == expected.outputs[0].token_ids
        for mine, other in zip(got.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
            assert list(mine) == list(other)
            assert [one.logprob for one in mine.values()] == pytest.approx([one.logprob for one in other.values()], abs=1e-4)


@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.extended)])
def test_alone_and_in_a_crowd_the_same(folder: Path, overlap: bool) -> None:
    """Histories are right after preemption, in another row, in a fork, and while the newest token is not on the host yet."""
    rng = np.random.default_rng(2)
    some = [rng.integers(0, common.VOCAB, rng.integers(1, 50)).tolist() for _ in range(16)]
    kinds: list[dict[str, Any]] = [
        {"presence_penalty": 2, "repetition_penalty": 1.5},
        {"frequency_penalty": 2, "n": 3},
        {"bad_words_ids": [[a, b] for a in range(12) for b in range(20)], "allowed_token_ids": list(range(20)) + [200]},
        {"logits_processors": ["next"], "top_k": 2},
        {"logit_bias": dict.fromkeys(range(40), 50), "repetition_penalty": 5, "n": 2, "best_of": 3},
        {},
    ]
    params = [SamplingParams(max_tokens=40, seed=index, ignore_eos=True, **kinds[index % 6]) for index in range(16)]
    roomy = LLM(folder, **OPTIONS, async_scheduling=False)
    expected = [roomy.generate([prompt], one, use_tqdm=False)[0] for prompt, one in zip(some, params, strict=True)]
    tight = LLM(folder, **OPTIONS | common.TIGHT, async_scheduling=overlap)
    outputs = tight.generate(some, params, use_tqdm=False)
    assert preemptions(outputs) > 5
    for mine, other in zip(outputs, expected, strict=True):
        assert [one.token_ids for one in mine.outputs] == [one.token_ids for one in other.outputs]


# ---- one parameter at a time


def test_penalties_let_no_token_come_again(llm: LLM) -> None:
    tokens = ids(llm, "hello", greedy(60, repetition_penalty=1e9))
    assert len(set(tokens)) == 60 and not {*tokens} & {*llm.get_tokenizer().encode("hello")}


def test_best_of_gives_the_likeliest(llm: LLM) -> None:
    many = llm.generate("hello", SamplingParams(n=6, max_tokens=8, seed=3, logprobs=0, ignore_eos=True), use_tqdm=False)[0].outputs
    best = llm.generate("hello", SamplingParams(n=2, best_of=6, max_tokens=8, seed=3, ignore_eos=True), use_tqdm=False)[0].outputs
    ranked = sorted(many, key=lambda one: -one.cumulative_logprob)[:2]
    assert [one.token_ids for one in best] == [one.token_ids for one in ranked]
    assert [one.index for one in best] == [0, 1] and best[0].logprobs is None
    assert [one.cumulative_logprob for one in best] == pytest.approx([one.cumulative_logprob for one in ranked])


def test_logits_processors_of_the_engine(llm: LLM) -> None:
    even = ids(llm, "hello", greedy(12, logits_processors=["even"]))
    assert all(token % 2 == 0 for token in even)
    counted = ids(llm, [[7]], greedy(12, logits_processors=["next"]))
    assert counted == list(range(8, 20))
    assert any(token % 2 for token in ids(llm, "hello", greedy(12)))
    with pytest.raises(InvalidRequestError, match="logits_processors has 'odd', but the engine has even, next"):
        ids(llm, "hello", greedy(logits_processors=["odd"]))


def test_bad_words_are_texts(llm: LLM) -> None:
    tokens = ids(llm, "hello", greedy(20))
    decode = llm.get_tokenizer().decode
    letters = dict.fromkeys(llm.get_tokenizer().encode("abc"), 100.0)
    free = ids(llm, "hello", greedy(20, logit_bias=letters))
    pair = decode(free[3:5])
    assert len(pair) == 2 and set(decode(free)) <= set("abc")
    assert pair not in decode(ids(llm, "hello", greedy(20, logit_bias=letters, bad_words=[pair])))
    single = ids(llm, "hello", greedy(20, bad_words_ids=[[tokens[0]]]))
    assert tokens[0] not in single


def test_before_min_tokens_nothing_ends_it(llm: LLM) -> None:
    letters = dict.fromkeys(llm.get_tokenizer().encode("abcde"), 100.0)
    free = llm.generate("hello", greedy(20, logit_bias=letters), use_tqdm=False)[0].outputs[0]
    stop = free.text[1]
    cut = llm.generate("hello", greedy(20, logit_bias=letters, stop=stop, min_tokens=6), use_tqdm=False)[0].outputs[0]
    place = free.text.find(stop, 6)
    assert cut.text == (free.text[:place] if place >= 0 else free.text)
    banned = greedy(20, logit_bias=letters, stop_token_ids=[free.token_ids[1]], min_tokens=6)
    tokens = ids(llm, "hello", banned)
    assert free.token_ids[1] not in tokens[:6] and len(tokens) >= 6


def test_stop_tokens_of_a_rows_last_request_are_forgotten(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request with min_tokens and no stop tokens, not even the model's end, has the row of one that had some."""
    monkeypatch.setattr(llm.engine._intake, "eos_token_ids", frozenset())
    free = ids(llm, "hello", greedy(8))
    held = ids(llm, "hello", greedy(8, stop_token_ids=[free[0], free[3]], min_tokens=8))
    assert not {free[0], free[3]} & {*held}
    assert ids(llm, "hello", greedy(8, min_tokens=8)) == free


def test_truncated_prompts(llm: LLM) -> None:
    tokens = llm.get_tokenizer().encode("hello there")
    for keep, expected in ((3, tokens[-3:]), (100, tokens), (-1, tokens)):
        output = llm.generate("hello there", greedy(truncate_prompt_tokens=keep), use_tqdm=False)[0]
        assert output.prompt_token_ids == expected
    long = llm.generate([[5] * 200], greedy(truncate_prompt_tokens=-1), use_tqdm=False)[0]
    assert len(long.prompt_token_ids) == 95 and len(long.outputs[0].token_ids) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"allowed_token_ids": [260]}, "allowed_token_ids has token id 260 at 0"),
        ({"logit_bias": {999: 1}}, "logit_bias has token id 999"),
        ({"bad_words_ids": [[1, 260]]}, "bad_words_ids has token id 260 at 1"),
        ({"allowed_token_ids": [3], "bad_words_ids": [[3]]}, "leave no token"),
        ({"allowed_token_ids": [257], "min_tokens": 2}, "every token that is allowed would end the sequence"),
        ({"bad_words": ["   "]}, "a text without tokens"),
        ({"bad_words": ["x" * 17]}, "one of 17 tokens, but each must have at most 16"),
        ({"bad_words_ids": [[a, a, b] for a in range(20) for b in range(20)]}, "400 sequences .* at most 256"),
    ],
)
def test_refusals(llm: LLM, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate("hello", SamplingParams(**fields), use_tqdm=False)
    assert not llm.engine.has_unfinished_requests


@pytest.mark.parametrize("processors", [["a"], {"": only_even}, {"a": 3}])
def test_wrong_processors_of_the_engine(folder: Path, processors: Any) -> None:
    with pytest.raises(ConfigError, match="logits_processors"):
        LLM(folder, **OPTIONS | {"logits_processors": processors})
