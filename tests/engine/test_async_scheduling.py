"""A step is on its way before the tokens of the one before it are on the host, and nobody can tell from what comes out."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pjax import LLM, BeamSearchParams, RequestOutput, SamplingParams
from pjax.config import EngineConfig
from pjax.engine import LLMEngine
from pjax.runner.batch import Bucket
from pjax.runner.programs import Shape
from pjax.runner.runner import ModelRunner
from tests.engine import common
from tests.engine.common import VOCAB, greedy

OPTIONS = common.TIGHT


@pytest.fixture(scope="module")
def waiting(folder: Path) -> LLM:
    return LLM(folder, **OPTIONS, async_scheduling=False)


def crowd(seed: int) -> list[tuple[list[int], Any]]:
    """More than runs at once, in a pool that is too small for it; some end by a token, some by a text, some are beams."""
    rng = np.random.default_rng(seed)
    requests: list[tuple[list[int], Any]] = []
    for index in range(14):
        prompt = rng.integers(0, VOCAB, rng.integers(1, 50)).tolist()
        most = int(rng.integers(1, 40))
        requests.append(
            (
                prompt,
                [
                    SamplingParams(temperature=0, max_tokens=most),
                    SamplingParams(temperature=0, max_tokens=most, stop_token_ids=rng.integers(0, VOCAB, 40).tolist(), logprobs=2),
                    SamplingParams(temperature=1.5, max_tokens=most, seed=index, stop=[chr(c) for c in range(97, 110)]),
                    SamplingParams(n=3, temperature=1.5, max_tokens=most, seed=index, top_k=9),
                    BeamSearchParams(beam_width=3, max_tokens=min(most, 12)),
                ][index % 5],
            )
        )
    return requests


def run(engine: LLMEngine, requests: list[tuple[list[int], Any]], abort: str | None = None) -> dict[str, RequestOutput]:
    """Three requests come before each step; the outputs of those that ended, by name."""
    done: dict[str, RequestOutput] = {}
    left = [(str(index), prompt, params) for index, (prompt, params) in enumerate(requests)][::-1]
    while left or engine.has_unfinished_requests:
        for _ in range(min(3, len(left))):
            name, prompt, params = left.pop()
            engine.add_request(prompt, params, name)
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        if abort is not None and engine.scheduler.num_running:
            engine.abort_request(abort)
        engine.scheduler.check()
    assert engine.scheduler.pool.num_used == 0 and not engine.scheduler.steps
    return done


@pytest.mark.parametrize("seed", range(3))
def test_the_same_outputs(llm: LLM, waiting: LLM, seed: int) -> None:
    requests = crowd(seed)
    ahead, behind = run(llm.engine, requests), run(waiting.engine, requests)
    assert set(ahead) == set(behind) == {str(index) for index in range(len(requests))}
    for name, output in ahead.items():
        for one, other in zip(output.outputs, behind[name].outputs, strict=True):
            assert (one.token_ids, one.text, one.finish_reason, one.stop_reason) == (
                other.token_ids,
                other.text,
                other.finish_reason,
                other.stop_reason,
            )
            if one.logprobs is not None:
                assert other.logprobs is not None
                assert [list(entry) for entry in one.logprobs] == [list(entry) for entry in other.logprobs]
    reasons = {output.finish_reason for result in ahead.values() for output in result.outputs}
    assert reasons == {"stop", "length"}
    assert llm.engine.stats().num_preemptions > 0, "the pool was meant to be too small"


def test_an_abort_while_steps_are_under_way(llm: LLM, waiting: LLM) -> None:
    requests = crowd(7)
    gone = run(llm.engine, requests, abort="3")
    assert "3" not in gone and len(gone) == len(requests) - 1
    for name, output in run(waiting.engine, requests).items():
        if name in gone:
            assert [o.token_ids for o in gone[name].outputs] == [o.token_ids for o in output.outputs]


def test_the_next_step_leaves_before_the_last_ones_tokens_come(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, events = llm.engine.runner, list[str]()
    dispatch, fetch = runner.dispatch, runner.fetch
    monkeypatch.setattr(runner, "dispatch", lambda *args: (events.append("dispatch"), dispatch(*args))[1])
    monkeypatch.setattr(runner, "fetch", lambda *args: (events.append("fetch"), fetch(*args))[1])
    llm.generate([[1, 2, 3], [4, 5]], greedy(8), use_tqdm=False)
    assert events == ["dispatch", *["dispatch", "fetch"] * 7, "fetch"], "and no step beyond the last token"


def test_a_failing_device_loses_only_time(llm: LLM, waiting: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = crowd(4)
    expected = run(waiting.engine, requests)
    engine, fetch, calls = llm.engine, llm.engine.runner.fetch, [0]

    def failing(step: Any) -> Any:
        calls[0] += 1
        if calls[0] % 5 == 0:
            raise RuntimeError("the device is gone")
        return fetch(step)

    monkeypatch.setattr(engine.runner, "fetch", failing)
    done: dict[str, RequestOutput] = {}
    for index, (prompt, params) in enumerate(requests):
        engine.add_request(prompt, params, str(index))
    while engine.has_unfinished_requests:
        try:
            outputs = engine.step()
        except RuntimeError:
            engine.scheduler.check()
            continue
        done |= {output.request_id: output for output in outputs if output.finished}
    assert {name: [o.token_ids for o in output.outputs] for name, output in done.items()} == {
        name: [o.token_ids for o in output.outputs] for name, output in expected.items()
    }


def test_tokens_do_not_wait_for_a_step_that_is_being_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lazy engine's first token comes while the step of the second is not there yet."""
    compile_it, may_go_on = ModelRunner._lower_and_compile, threading.Event()

    def later(runner: ModelRunner, shape: Shape) -> Any:
        assert not (isinstance(shape, Bucket) and shape.decode_only) or may_go_on.wait(60)
        return compile_it(runner, shape)

    monkeypatch.setattr(ModelRunner, "_lower_and_compile", later)
    engine = LLMEngine(folder, EngineConfig(**{k: v for k, v in OPTIONS.items() if k != "progress"}, compilation_cache_dir=None))
    engine.add_request([1, 2, 3], greedy(4))
    engine.prefetch()
    (output,) = engine.step()
    assert len(output.outputs[0].token_ids) == 1 and not may_go_on.is_set()
    may_go_on.set()
    while not output.finished:
        (output,) = engine.step()
    assert len(output.outputs[0].token_ids) == 4
