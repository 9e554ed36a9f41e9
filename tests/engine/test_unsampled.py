"""Sequences whose next token cannot be sampled end with reason "error"; whoever runs beside them gets the tokens of a healthy model."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pjax import LLM, AsyncLLM, BeamSearchParams, RequestOutput, SamplingParams
from tests.engine.common import OPTIONS, greedy, ids
from tests.tiny import write_model

POISON = 7
"""The token whose embedding is infinite in the damaged model: whoever reads it has NaN for logits."""
HEALTHY = [list(range(20 + 3 * i, 26 + 7 * i)) for i in range(3)]
NOT_FINITE = r"no token \d+ could be sampled: the model's logits hold NaN or infinity, .* \(request '.+'\)"
NO_TOKEN = r"no token \d+ could be sampled: logits_processors, allowed_token_ids, .* \(request '.+'\)"


def write_damaged(folder: Path, token: int) -> Path:
    """The made-up checkpoint, but a token's embedding is infinite."""
    write_model(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = np.inf
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def damaged_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_damaged(tmp_path_factory.mktemp("damaged"), POISON)


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[int]]:
    """What the healthy model says to the healthy prompts; it reads no POISON."""
    found = [ids(llm, [prompt], greedy(10)) for prompt in HEALTHY]
    assert all(POISON not in prompt + tokens for prompt, tokens in zip(HEALTHY, found, strict=True))
    return found


def run(llm: LLM, requests: dict[str, tuple[list[int], Any]]) -> dict[str, RequestOutput]:
    """The last outputs of requests that run beside each other. Nothing is left behind."""
    engine, done = llm.engine, dict[str, RequestOutput]()
    for name, (prompt, params) in requests.items():
        engine.add_request(prompt, params, name)
    while engine.has_unfinished_requests:
        done |= {output.request_id: output for output in engine.step() if output.finished}
        engine.scheduler.check()
    assert engine.scheduler.pool.num_used == 0 and done.keys() == requests.keys()
    return done


def beside_healthy(llm: LLM, prompt: list[int], params: Any, expected: list[list[int]]) -> RequestOutput:
    """The last output of one request, beside healthy ones that must get what they get alone."""
    done = run(llm, {"bad": (prompt, params)} | {str(i): (healthy, greedy(10)) for i, healthy in enumerate(HEALTHY)})
    assert [done[str(i)].outputs[0].token_ids for i in range(3)] == expected
    return done["bad"]


@pytest.mark.parametrize(
    "params",
    [
        greedy(10),
        SamplingParams(max_tokens=10, seed=3, ignore_eos=True),
        SamplingParams(max_tokens=10, seed=3, n=2, logprobs=2, top_k=5, ignore_eos=True),
        greedy(10, presence_penalty=1.0, allowed_token_ids=list(range(200))),
    ],
    ids=["greedy", "sampled", "several", "rules"],
)
@pytest.mark.parametrize("ahead", [True, False])
def test_a_row_of_nan_fails_alone(
    damaged_folder: Path, expected: list[list[int]], params: SamplingParams, ahead: bool, caplog: pytest.LogCaptureFixture
) -> None:
    llm = LLM(damaged_folder, **OPTIONS, async_scheduling=ahead)
    with caplog.at_level(logging.WARNING, "pjax.engine"):
        output = beside_healthy(llm, [30, 31, POISON, 32], params, expected)
    messages = [record.getMessage() for record in caplog.records if record.name == "pjax.engine.views"]
    assert len(output.outputs) == len(messages) == params.n
    for sequence, message in zip(output.outputs, messages, strict=True):
        assert (sequence.finish_reason, sequence.token_ids, sequence.text) == ("error", [], "")
        assert sequence.stop_reason == message and re.fullmatch(NOT_FINITE, message) and "no token 4 " in message
        assert sequence.logprobs in (None, [])
    assert output.metrics.finished_time is not None
    assert llm.engine.stats().generation_tokens == 30


@pytest.mark.parametrize("ahead", [True, False])
def test_what_was_generated_before_is_kept(tmp_path: Path, expected: list[list[int]], ahead: bool) -> None:
    """The fourth token is read by the fifth step, which fails; the step after it is under way by then."""
    tokens = expected[0]
    assert tokens.index(tokens[3]) == 3 and tokens[3] not in HEALTHY[0]
    llm = LLM(write_damaged(tmp_path, tokens[3]), **OPTIONS, async_scheduling=ahead)
    output = llm.generate([HEALTHY[0]], greedy(10, logprobs=1), use_tqdm=False)[0]
    assert output.finished and output.outputs[0].finish_reason == "error"
    assert output.outputs[0].token_ids == tokens[:4] and len(output.outputs[0].logprobs or ()) == 4
    assert re.fullmatch(NOT_FINITE, str(output.outputs[0].stop_reason))
    llm.engine.scheduler.check()


def test_a_beam_search_with_a_bad_row_fails_as_a_whole(damaged_folder: Path, expected: list[list[int]]) -> None:
    llm = LLM(damaged_folder, **OPTIONS)
    params = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)
    output = beside_healthy(llm, [30, POISON], params, expected)
    [sequence] = output.outputs
    assert (sequence.finish_reason, sequence.token_ids) == ("error", []) and re.fullmatch(NOT_FINITE, str(sequence.stop_reason))
    [found] = llm.beam_search([[30, POISON]], params)[0].sequences
    assert (found.finish_reason, found.tokens) == ("error", [30, POISON]) and re.fullmatch(NOT_FINITE, str(found.stop_reason))


def test_a_beam_that_fails_later_ends_the_search(llm: LLM, tmp_path: Path) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)
    healthy = llm.beam_search([HEALTHY[0]], params)[0].sequences
    token = healthy[0].tokens[len(HEALTHY[0]) + 2]
    bad = LLM(write_damaged(tmp_path, token), **OPTIONS)
    found = bad.beam_search([HEALTHY[0]], params)[0].sequences
    assert {one.finish_reason for one in found} == {"error"}
    assert any(one.tokens == healthy[0].tokens[: len(one.tokens)] for one in found)
    bad.engine.scheduler.check()
    assert bad.engine.scheduler.pool.num_used == 0


def nothing(logits: jax.Array, token_ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """Leaves no token of rows with 8 or more."""
    return jnp.where(lengths[:, None] < 8, logits, -jnp.inf)


def broken(logits: jax.Array, token_ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """NaN."""
    return logits * jnp.nan


def test_logits_processors_that_leave_nothing_harm_their_own_row(folder: Path, expected: list[list[int]]) -> None:
    llm = LLM(folder, **OPTIONS, logits_processors={"nothing": nothing, "broken": broken})
    for name, count in (("nothing", 3), ("broken", 0)):
        output = beside_healthy(llm, [1, 2, 3, 4, 5], greedy(10, logits_processors=[name]), expected)
        assert output.outputs[0].finish_reason == "error" and len(output.outputs[0].token_ids) == count
        assert re.fullmatch(NO_TOKEN, str(output.outputs[0].stop_reason))


def test_the_best_of_many_are_those_that_did_not_fail(tmp_path: Path, llm: LLM) -> None:
    """A sequence that has failed has fewer tokens, and so the larger sum of log-probabilities."""
    params = SamplingParams(n=6, max_tokens=8, seed=3, logprobs=0, ignore_eos=True)
    many = llm.generate([HEALTHY[0]], params, use_tqdm=False)[0].outputs
    token = many[0].token_ids[1]
    healthy = [one for one in many if token not in one.token_ids[:-1]]
    assert 2 <= len(healthy) < 6
    bad = LLM(write_damaged(tmp_path, token), **OPTIONS)
    failed = bad.generate([HEALTHY[0]], params, use_tqdm=False)[0].outputs
    assert [one.finish_reason for one in failed] == ["length" if one in healthy else "error" for one in many]
    best = SamplingParams(n=2, best_of=6, max_tokens=8, seed=3, ignore_eos=True)
    outputs = bad.generate([HEALTHY[0]], best, use_tqdm=False)[0].outputs
    ranked = sorted(healthy, key=lambda one: -(one.cumulative_logprob or 0.0))[:2]
    assert [one.token_ids for one in outputs] == [one.token_ids for one in ranked]


def test_pages_of_a_failed_request_are_not_found_again(folder: Path, llm: LLM) -> None:
    """A page of a cached prefix is spoilt in the device's memory; the request that meets it fails, the next one computes it anew."""
    prompt = list(range(40, 80))
    expected = ids(llm, [prompt], greedy(6))
    victim = LLM(folder, **OPTIONS)
    assert ids(victim, [prompt], greedy(6)) == expected
    runner = victim.engine.runner
    runner._pages = jax.device_put(jnp.full_like(runner._pages, jnp.nan), runner._pages.format)
    first, second = (victim.generate([prompt], greedy(6), use_tqdm=False)[0] for _ in range(2))
    assert first.num_cached_tokens == 32 and first.outputs[0].finish_reason == "error"
    assert second.num_cached_tokens == 0 and second.outputs[0].token_ids == expected


def test_a_page_that_the_last_step_fills_is_not_found_again_either(llm: LLM, tmp_path: Path) -> None:
    """The first generated token is the sixteenth of the page, and the one whose keys and values are NaN."""
    prompt = list(range(60, 75))
    [token] = ids(llm, [prompt], greedy(1))
    bad = LLM(write_damaged(tmp_path, token), **OPTIONS)
    for count in (6, 2):  # the first compiles; then the last step is under way before the first token is known
        assert bad.generate([prompt], greedy(count), use_tqdm=False)[0].outputs[0].finish_reason == "error"
    assert bad.engine.scheduler.pool.num_kept == 0


def test_callers_of_async_llm_see_the_error_as_the_last_output(damaged_folder: Path, expected: list[list[int]]) -> None:
    async def last(llm: AsyncLLM, prompt: list[int]) -> RequestOutput:
        outputs = [output async for output in llm.generate(prompt, greedy(10))]
        return outputs[-1]

    async def all_of(llm: AsyncLLM) -> list[RequestOutput]:
        return await asyncio.gather(*(last(llm, prompt) for prompt in ([POISON], *HEALTHY, [POISON, 3])))

    llm = AsyncLLM(damaged_folder, **OPTIONS)
    try:
        bad, *good, other = asyncio.run(all_of(llm))
        assert llm.is_running
    finally:
        llm.close()
    assert [output.outputs[0].token_ids for output in good] == expected
    for output in (bad, other):
        assert output.finished and output.outputs[0].finish_reason == "error"
        assert re.fullmatch(NOT_FINITE, str(output.outputs[0].stop_reason))
