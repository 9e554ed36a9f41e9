"""Transitions of a sequence: steps under way, how it ends, and what a transition leaves that fails half-way."""

from __future__ import annotations

from typing import Any

import pytest

from pjax.outputs import RequestMetrics
from pjax.params import SamplingParams
from pjax.scheduler import Request, RequestStatus, Scheduler, StepPlan

SIZES: dict[str, Any] = {
    "num_pages": 9,
    "page_size": 4,
    "max_model_len": 24,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "num_host_slots": 8,
    "preemption_mode": "swap",
}
EOS = 0


def make_requests(name: str, prompt: list[int], n: int = 1, max_tokens: int = 8) -> list[Request]:
    common: dict[str, Any] = {
        "request_id": name,
        "prompt_token_ids": prompt,
        "params": SamplingParams(n=n, temperature=1),
        "max_tokens": max_tokens,
        "stop_token_ids": frozenset(),
        "eos_token_ids": frozenset([EOS]),
        "seed": 0,
        "metrics": RequestMetrics(arrival_time=0.0),
    }
    return [Request(**common, index=index) for index in range(n)]


def schedule(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    scheduler.check()
    assert plan is not None
    return plan


def test_steps_are_committed_in_their_order() -> None:
    scheduler, (a,) = Scheduler(**SIZES), make_requests("a", [1, 2, 3])
    scheduler.add(a)
    first, second = schedule(scheduler), schedule(scheduler)
    assert list(scheduler.steps) == [first, second] and a.num_in_flight == 2
    with pytest.raises(ValueError, match="the step is not the oldest of the 2 under way"):
        scheduler.commit(second, [7], 1.0)
    assert list(scheduler.steps) == [first, second] and a.output_token_ids == []
    scheduler.commit(first, [7], 1.0)
    assert list(scheduler.steps) == [second] and (a.num_in_flight, a.output_token_ids) == (1, [7])
    with pytest.raises(ValueError, match="not the oldest of the 1 under way"):
        scheduler.commit(first, [7], 1.0)
    scheduler.commit(second, [8], 1.0)
    with pytest.raises(ValueError, match="not the oldest of the 0 under way"):
        scheduler.commit(second, [8], 1.0)
    scheduler.check()


def test_check_counts_the_tokens_in_flight() -> None:
    scheduler, (a,) = Scheduler(**SIZES), make_requests("a", [1, 2, 3])
    scheduler.add(a)
    schedule(scheduler)
    a.num_in_flight = 2
    with pytest.raises(AssertionError, match="request 'a' has 2 tokens in flight"):
        scheduler.check()


def test_steps_are_dropped_when_nobody_waits_for_them() -> None:
    scheduler, (a,) = Scheduler(**SIZES), make_requests("a", [1, 2, 3])
    scheduler.add(a)
    schedule(scheduler)
    with pytest.raises(AssertionError, match="requests wait"):
        scheduler.drop_steps()
    scheduler.abort("a")
    scheduler.drop_steps()
    assert not scheduler.steps and a.num_in_flight == 0


@pytest.mark.parametrize(
    ("token", "max_tokens", "text", "ended"),
    [
        (9, 8, None, (None, None)),
        (9, 8, "xy", ("stop", "xy")),
        (9, 1, None, ("length", None)),
        (9, 1, "xy", ("stop", "xy")),
        (EOS, 8, None, ("stop", None)),
        (EOS, 8, "xy", ("stop", "xy")),
        (-1, 8, "no token", ("error", "no token")),
    ],
)
def test_a_token_and_its_text_end_a_sequence_once(token: int, max_tokens: int, text: str | None, ended: tuple[Any, Any]) -> None:
    scheduler, (a,) = Scheduler(**SIZES), make_requests("a", [1, 2, 3], max_tokens=max_tokens)
    scheduler.add(a)
    told: list[Any] = []

    def observe(request: Request, index: int, reason: str | None) -> str | None:
        told.append((request, index, reason, request.status, list(request.output_token_ids)))
        return text

    assert scheduler.commit(schedule(scheduler), [token], 3.0, observe=observe) == [a]
    reason = {9: "length" if max_tokens == 1 else None, EOS: "stop", -1: "error"}[token]
    assert told == [(a, 0, reason, RequestStatus.RUNNING, [] if token < 0 else [token])], "it has its token, and runs still"
    assert (a.finish_reason, a.stop_reason) == ended
    assert a.metrics.finished_time == (None if ended[0] is None else 3.0)
    scheduler.check()


def test_text_that_fails_ends_all_samples_of_the_request_and_nobody_else() -> None:
    scheduler, (a,), pair = Scheduler(**SIZES), make_requests("a", [1, 2, 3]), make_requests("b", [4, 5], 2)
    scheduler.add(*pair)
    scheduler.add(a)

    def observe(request: Request, index: int, reason: str | None) -> str | None:
        if request is pair[0]:
            raise KeyError("text")
        return None

    plan = schedule(scheduler)
    assert plan.sampled == [*pair, a]
    assert scheduler.commit(plan, [7, 8, 9], 3.0, observe=observe) == [pair[0], a]
    assert {(one.finish_reason, one.stop_reason) for one in pair} == {("error", "KeyError: 'text' (request 'b')")}
    assert (a.output_token_ids, a.status, scheduler.unfinished) == ([9], RequestStatus.RUNNING, {"a": [a]})
    scheduler.check()


def run(scheduler: Scheduler, groups: list[list[Request]]) -> None:
    """To the end, two steps under way; a step that fails is tried again. Each token is the number of those before it."""
    for group in groups:
        scheduler.add(*group)
    for _ in range(200):
        if not scheduler.has_work:
            break
        try:
            while len(scheduler.steps) < 2 and scheduler.schedule() is not None:
                scheduler.check()
        except ZeroDivisionError:
            scheduler.preempt_all()
            scheduler.check()
            continue
        if len(scheduler.steps):
            plan = scheduler.steps[0]
            scheduler.commit(plan, [request.num_tokens for request in plan.sampled], 1.0)
            scheduler.check()
    assert not scheduler.has_work and scheduler.pool.num_used == 0 and scheduler.table.num_free_rows == SIZES["max_num_seqs"]
    assert scheduler.kv.swap.pool is not None and scheduler.kv.swap.pool.num_used == 0


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("method", ["find_cached", "can_start", "start", "extend", "remember", "take_copies", "fork", "save", "release"])
def test_a_transition_that_fails_half_way_loses_nothing(method: str, call: int, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(**SIZES)
    groups = [make_requests(name, [*range(1, 6)], n, 12) for name, n in (("a", 1), ("b", 3), ("c", 1), ("d", 2))]
    whole, calls, scheduling = getattr(scheduler.kv, method), [0], scheduler.schedule

    def fails(*arguments: Any, **fields: Any) -> Any:
        calls[0] += is_scheduling[0]
        if calls[0] == call and is_scheduling[0] and not after:
            raise ZeroDivisionError
        made = whole(*arguments, **fields)
        if calls[0] == call and is_scheduling[0] and after:
            raise ZeroDivisionError
        return made

    is_scheduling = [False]

    def schedule() -> StepPlan | None:
        is_scheduling[0] = True
        try:
            return scheduling()
        finally:
            is_scheduling[0] = False

    monkeypatch.setattr(scheduler, "schedule", schedule)
    monkeypatch.setattr(scheduler.kv, method, fails)
    run(scheduler, groups)
    assert calls[0] >= call, "it was called so often"
    assert all(request.output_token_ids == [*range(5, 17)] for group in groups for request in group)
    assert {request.finish_reason for group in groups for request in group} == {"length"}
