"""Priorities and deadlines through the engine."""

from __future__ import annotations

import time
from typing import Any

import pytest

from pjax import LLM, BeamSearchParams, SamplingParams
from pjax.errors import InvalidRequestError
from tests.engine.common import OPTIONS as OPTIONS
from tests.engine.common import greedy, ids


def test_one_of_a_better_priority_is_served_first(llm: LLM) -> None:
    engine = llm.engine
    for number in range(6):
        engine.add_request([5, 6, number], greedy(2), f"plain {number}")
    engine.add_request([5, 6, 7], greedy(2), "better", priority=-1)
    engine.add_request([5, 6, 8], greedy(2), "worse", priority=1)
    order = []
    while engine.has_unfinished_requests:
        order += [output.request_id for output in engine.step() if output.finished]
    assert order == ["better", *(f"plain {number}" for number in range(6)), "worse"]


def test_a_short_prompt_gets_its_first_token_within_three_steps(llm: LLM) -> None:
    """Three prompts of 90 tokens, of which a step takes 32, would keep it waiting for nine."""
    alone, engine = ids(llm, [9, 8, 7], greedy(4)), llm.engine
    for number in range(3):
        engine.add_request([5 + number] * 90, greedy(2), f"long {number}")
    engine.step()
    engine.add_request([9, 8, 7], greedy(4), "short")
    seen = {output.request_id: output for _ in range(3) for output in engine.step()}
    assert seen["short"].outputs[0].token_ids == alone[: len(seen["short"].outputs[0].token_ids)] != []
    while engine.has_unfinished_requests:
        seen |= {output.request_id: output for output in engine.step()}
    assert seen["short"].outputs[0].token_ids == alone and all(output.finished for output in seen.values()) and len(seen) == 4


def test_a_list_of_priorities_comes_back_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [[3, number] for number in range(7)]
    plain = llm.generate(prompts, greedy(4), use_tqdm=False)
    mixed = llm.generate(prompts, greedy(4), use_tqdm=False, priority=[3, 1, 2, 0, -1, 5, 0])
    assert [o.outputs[0].token_ids for o in mixed] == [o.outputs[0].token_ids for o in plain]
    started = [o.metrics.first_scheduled_time or 0.0 for o in mixed]
    assert max(started[3], started[4], started[6]) < started[0] and started[2] <= started[0] <= started[5]


@pytest.mark.parametrize("bad", [{"priority": 1.5}, {"priority": True}, {"priority": 2**60}, {"timeout": 0}, {"timeout": float("nan")}])
def test_wrong_priorities_and_timeouts_are_refused(llm: LLM, bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{next(iter(bad))} is "):
        llm.engine.add_request([1, 2], greedy(2), **bad)
    assert not llm.engine.has_unfinished_requests


def test_a_number_of_priorities_must_fit(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="there are 1 priorities for 2 prompts"):
        llm.generate([[1], [2]], greedy(2), use_tqdm=False, priority=[1])


@pytest.mark.parametrize("params", [greedy(90), SamplingParams(n=3, max_tokens=80, ignore_eos=True)])
def test_a_deadline_ends_a_request_with_what_it_has(llm: LLM, params: SamplingParams) -> None:
    engine = llm.engine
    expected = [output.token_ids for output in llm.generate([4, 5, 6], params, use_tqdm=False)[0].outputs] if params.n == 1 else []
    engine.add_request([4, 5, 6], params, "late", timeout=3600.0)
    engine.add_request([4, 5, 7], greedy(40), "other")
    tokens = 0
    while tokens < 5:
        tokens = max(len(o.outputs[0].token_ids) for o in engine.step() if o.request_id == "late")
    engine.scheduler.deadlines.remove("late")
    engine.scheduler.deadlines.add("late", time.monotonic() - 1)  # an hour has passed
    (output,) = engine.step()
    assert (output.request_id, output.finished, len(output.outputs)) == ("late", True, params.n)
    assert {(one.finish_reason, len(one.token_ids)) for one in output.outputs} == {("timeout", tokens)}
    assert not expected or output.outputs[0].token_ids == expected[0][:tokens]
    assert output.metrics.finished_time is not None
    left = {o.request_id for _ in range(60) for o in engine.step()}
    assert left == {"other"} and not engine.has_unfinished_requests and engine.scheduler.pool.num_used == 0


def test_beams_that_are_ended_give_what_they_have(llm: LLM) -> None:
    engine = llm.engine
    engine.add_request([9, 8, 7], BeamSearchParams(beam_width=3, max_tokens=20, ignore_eos=True), "beams")
    for _ in range(5):
        engine.step()
    output = engine.abort_request("beams")
    assert output is not None and output.finished and [len(one.token_ids) for one in output.outputs] == [5] * 3
    totals = [one.cumulative_logprob for one in output.outputs]
    assert {one.finish_reason for one in output.outputs} == {"abort"} and totals == sorted(totals, reverse=True)
    assert engine.scheduler.pool.num_used == 0


def test_generate_with_a_time_limit(llm: LLM) -> None:
    outputs = llm.generate([[1, 2]] * 3, greedy(4), use_tqdm=False, timeout=1e-6)
    assert [(o.outputs[0].finish_reason, o.outputs[0].token_ids) for o in outputs] == [("timeout", [])] * 3
