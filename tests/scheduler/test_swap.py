"""What is copied to host memory when a request is preempted, and back: small plans word for word."""

from __future__ import annotations

from typing import Any

import pytest

from pjax.kv_cache.kv_manager import CachedPrefix
from pjax.kv_cache.page_pool import PageRun
from pjax.kv_cache.swap_space import PreemptionCost
from pjax.outputs import RequestMetrics
from pjax.params import SamplingParams
from pjax.scheduler import Request, Scheduler, StepPlan

SIZES: dict[str, Any] = {
    "num_pages": 12,
    "page_size": 4,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "num_host_slots": 8,
    "preemption_mode": "swap",
}


def make_requests(name: str, prompt: list[int], n: int = 1, max_tokens: int = 8) -> list[Request]:
    metrics = RequestMetrics(arrival_time=0.0)
    common: dict[str, Any] = {"request_id": name, "prompt_token_ids": prompt, "params": SamplingParams(n=n), "max_tokens": max_tokens}
    ends: dict[str, Any] = {"seed": 0, "stop_token_ids": frozenset(), "eos_token_ids": frozenset()}
    return [Request(**common, **ends, metrics=metrics, index=index) for index in range(n)]


def make(*requests: Request, **changes: Any) -> Scheduler:
    scheduler = Scheduler(**SIZES | changes)
    for request in requests:
        scheduler.add(request)
    return scheduler


def step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    scheduler.check()
    assert plan is not None
    scheduler.commit(plan, [9] * len(plan.sampled), 1.0)
    scheduler.check()
    return plan


def evict_all(scheduler: Scheduler) -> None:
    pool = scheduler.pool
    pool.free(pool.allocate(pool.num_free))


def test_pages_go_out_and_come_back_and_only_one_token_is_computed() -> None:
    (a,) = make_requests("a", [*range(1, 10)])
    scheduler = make(a)
    step(scheduler)
    pages = scheduler.kv.pages_of(a)[:3]
    scheduler.preempt(a)
    evict_all(scheduler)
    plan = step(scheduler)
    assert plan.swap_outs.tolist() == [[pages[0], 0], [pages[1], 1], [pages[2], 2]]
    assert plan.swap_ins[:, 0].tolist() == plan.swap_outs[:, 1].tolist() and plan.swap_ins[:, 1].tolist() == scheduler.kv.pages_of(a)[:3]
    assert (plan.starts.tolist(), plan.counts.tolist()) == ([9], [1])
    assert scheduler.kv.swap.pool is not None and scheduler.kv.swap.pool.num_used == 0


def test_pages_that_still_live_are_not_copied_back() -> None:
    (a,) = make_requests("a", [*range(1, 11)])
    scheduler = make(a)
    step(scheduler)
    scheduler.preempt(a)
    plan = step(scheduler)
    assert len(plan.swap_outs) == 3 and plan.starts.tolist() == [10]
    assert len(plan.swap_ins) == 1, "the two full ones are found in the pool; the last one has no key"


def test_a_page_that_two_share_is_saved_once() -> None:
    (a,), (b,) = make_requests("a", [*range(1, 10)]), make_requests("b", [*range(1, 9), 77, 78])
    scheduler = make(a, b)
    step(scheduler)
    for request in (b, a):
        scheduler.preempt(request)
    scheduler.check()
    outs, _ = scheduler.kv.swap.take()
    assert len(outs) == 2 + 1 + 1
    evict_all(scheduler)
    plan = step(scheduler)
    assert len(plan.swap_ins) == 2 + 1 + 1, "the second finds the shared pages where the first has put them"
    assert plan.counts.tolist() == [1, 1]


def test_a_page_that_was_to_be_copied_is_saved_from_where_its_contents_are() -> None:
    """Two samples share a partly filled page. The step promises the younger one a copy and then preempts it."""
    first, second = make_requests("a", [*range(1, 8)], 2, max_tokens=4)
    scheduler = Scheduler(**SIZES)
    scheduler.add(first, second)
    step(scheduler)
    shared = scheduler.kv.pages_of(second)[:2]
    for request in (first, second):
        assert scheduler.kv.extend(request, 8)
    youngest = first if scheduler.kv.pages_of(first)[1] != shared[1] else second
    assert scheduler.kv.pages_of(youngest)[1] != shared[1]
    scheduler.preempt(youngest)
    outs, _ = scheduler.kv.swap.take()
    assert [page for page, _ in outs] == shared and scheduler.kv.take_copies() == []


def test_slots_that_a_step_reads_are_not_given_away_in_it() -> None:
    (a,), (b,) = make_requests("a", [*range(1, 10)]), make_requests("b", [*range(20, 30)])
    scheduler = make(a, b, num_host_slots=3, enable_prefix_caching=False)
    step(scheduler)
    scheduler.preempt(b)
    swap = scheduler.kv.swap
    swap.take()
    scheduler._start({}, b, CachedPrefix(0, (PageRun([]),)), 0, 0.0)
    scheduler.check()
    assert not swap.save(a, [PageRun(scheduler.kv.pages_of(a)[:3])], 9, 0), "all three slots are still read by the coming step"
    assert len(swap.take()[1]) == 3
    assert swap.save(a, [PageRun(scheduler.kv.pages_of(a)[:3])], 9, 0)
    swap.drop(a)


def test_without_room_it_is_computed_again() -> None:
    (a,), (b,) = make_requests("a", [*range(1, 10)]), make_requests("b", [*range(20, 30)])
    scheduler = make(a, b, num_host_slots=4)
    step(scheduler)
    for request in (b, a):
        scheduler.preempt(request)
    evict_all(scheduler)
    plan = step(scheduler)
    assert [(r.request_id, start) for r, start in zip(plan.requests, plan.starts.tolist(), strict=True)] == [("b", 10), ("a", 0)]
    assert scheduler.kv.swap.num_saved_pages == 3


def test_one_slot_is_enough_for_one_page() -> None:
    (a,) = make_requests("a", [1, 2, 3])
    scheduler = make(a, num_host_slots=1)
    step(scheduler)
    scheduler.preempt(a)
    evict_all(scheduler)
    plan = step(scheduler)
    assert (len(plan.swap_outs), len(plan.swap_ins), plan.starts.tolist()) == (1, 1, [3])


@pytest.mark.parametrize("how", ["abort", "expire", "finish", "forget", "fail"])
def test_nothing_stays_saved_of_what_ended_or_was_lost(how: str) -> None:
    (a,) = make_requests("a", [*range(1, 10)])
    a.deadline = 5.0
    scheduler = make(a)
    step(scheduler)
    scheduler.preempt(a)
    pool = scheduler.kv.swap.pool
    assert pool is not None and pool.num_used == 3
    if how == "abort":
        scheduler.abort("a")
    elif how == "expire":
        assert scheduler.expire(5.0) == ["a"]
    elif how == "finish":
        scheduler.finish(a, "stop")
    elif how == "forget":
        scheduler.kv.begin_epoch()
    else:
        scheduler.preempt_all()
    scheduler.check()
    assert pool.num_used == 0
    if how in ("forget", "fail"):
        assert step(scheduler).starts.tolist() == [0], "what was saved is of no use any more"


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_pages_of_earlier_weights_are_nobody_elses(mode: str) -> None:
    """A request goes on with them and is preempted: neither its pages nor its slots are found, unless all is computed anew."""
    prompt = [*range(1, 10)]
    (a,), (b,), (c,) = (make_requests(name, prompt) for name in "abc")
    scheduler = make(a, preemption_mode=mode)
    step(scheduler)
    scheduler.kv.begin_epoch()
    scheduler.preempt(a)
    assert step(scheduler).starts.tolist() == ([9] if mode == "swap" else [0])
    scheduler.abort("a")
    scheduler.add(b)
    assert step(scheduler).starts.tolist() == ([0] if mode == "swap" else [8])
    scheduler.preempt(b)
    evict_all(scheduler)
    plan = step(scheduler)
    assert len(plan.swap_ins) == (3 if mode == "swap" else 0), "its own pages, with the newest weights"
    scheduler.add(c)
    assert step(scheduler).starts.tolist() == [10, 8], "those of today are found"


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_pages_that_may_hold_nan_are_not_found_though_their_request_was_preempted(mode: str) -> None:
    """Its step ends without a token after the next one was planned, for which it gave its pages away."""
    prompt = [*range(1, 10)]
    (a,), (b,) = make_requests("a", prompt), make_requests("b", prompt)
    scheduler = make(a, preemption_mode=mode)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.preempt(a)
    assert scheduler.commit(plan, [-1], 1.0) == [a] and a.finish_reason == "error"
    scheduler.check()
    scheduler.add(b)
    plan = step(scheduler)
    assert plan.starts.tolist() == [0] and len(plan.swap_ins) == 0
    swap = scheduler.kv.swap.pool
    assert swap is None or not swap.keyed().any()


def test_keys_of_a_waiting_request_are_those_of_the_weights_it_will_run_with() -> None:
    """It looked for cached pages, did not fit, and waits while the weights are updated."""
    (a,), (b,) = make_requests("a", [*range(1, 10)], max_tokens=30), make_requests("b", [*range(20, 60)], max_tokens=8)
    scheduler = make(a)
    step(scheduler)
    scheduler.add(b)
    assert step(scheduler).requests == [a] and b.page_keys, "no room for both"
    keys = list(b.page_keys)
    scheduler.kv.begin_epoch()
    scheduler.abort("a")
    assert step(scheduler).starts.tolist() == [0]
    assert b.epoch == scheduler.kv.epoch and not set(b.page_keys) & set(keys)


def test_the_rule() -> None:
    cost = PreemptionCost()
    assert not cost.swap_pays(100, 1), "nothing is measured"
    cost.observe_step(0, 64, 1.0)
    assert cost.seconds_per_token == 0, "a step of decode rows says nothing about recomputing"
    cost.observe_step(100, 100, 0.5)
    cost.observe_step(100, 100, 1.5)
    assert cost.seconds_per_token == pytest.approx(0.006)
    cost.observe_copy(64, 0.64)
    assert cost.swap_pays(num_tokens=100, num_copies=59) and not cost.swap_pays(num_tokens=100, num_copies=61)


@pytest.mark.parametrize(("seconds_per_page", "saved"), [(1e-6, 3), (1.0, 0)])
def test_auto_takes_what_is_cheaper(seconds_per_page: float, saved: int) -> None:
    (a,) = make_requests("a", [*range(1, 10)])
    scheduler = make(a, preemption_mode="auto")
    scheduler.kv.swap.cost.observe_step(9, 9, 0.01)
    scheduler.kv.swap.cost.observe_copy(1, seconds_per_page)
    step(scheduler)
    scheduler.preempt(a)
    assert scheduler.kv.swap.num_saved_pages == saved
