"""Several sequences of one prompt, on small plans: computed once, shared, copied before a write."""

from __future__ import annotations

import pytest

from pjax.outputs import RequestMetrics
from pjax.params import SamplingParams
from pjax.scheduler import Request, RequestStatus, Scheduler, StepPlan

SIZES = {"num_pages": 64, "page_size": 4, "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16}


def make_requests(name: str, prompt: list[int], n: int, max_tokens: int = 4) -> list[Request]:
    metrics = RequestMetrics(arrival_time=0.0)
    common = {"request_id": name, "prompt_token_ids": prompt, "params": SamplingParams(n=n), "max_tokens": max_tokens, "seed": 0}
    ends = {"stop_token_ids": frozenset[int](), "eos_token_ids": frozenset([0])}
    return [Request(**common, **ends, metrics=metrics, index=index) for index in range(n)]


def schedule(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    scheduler.check()
    assert plan is not None
    return plan


def commit(scheduler: Scheduler, plan: StepPlan, tokens: list[int] | None = None) -> None:
    scheduler.commit(plan, [9] * len(plan.sampled) if tokens is None else tokens, 1.0)
    scheduler.check()


def test_the_prompt_is_computed_once_and_its_last_page_copied_before_a_write() -> None:
    scheduler = Scheduler(**SIZES)
    samples = make_requests("a", [*range(1, 7)], 3)
    scheduler.add(*samples)
    plan = schedule(scheduler)
    assert (plan.counts.tolist(), plan.copies.tolist(), scheduler.pool.num_used) == ([6], [], 2)
    assert plan.sampled == samples and plan.sample_sources.tolist() == [0, 0, 0]
    assert [r.status.value for r in samples] == ["running"] * 3, "each goes on by itself"
    commit(scheduler, plan, [10, 11, 12])
    assert [r.output_token_ids for r in samples] == [[10], [11], [12]]
    assert scheduler.pool.num_used == 2, "three sequences on two pages"
    plan = schedule(scheduler)
    tables = scheduler.block_tables.ids[0]
    pages = [tables[r.row, :2].tolist() for r in samples]
    assert plan.copies.tolist() == [[1, pages[0][1]], [1, pages[1][1]]] and pages[2][1] == 1, "the last owner keeps the page"
    assert len({page[1] for page in pages}) == 3 and {page[0] for page in pages} == {0}
    commit(scheduler, plan)
    assert len(schedule(scheduler).copies) == 0
    assert scheduler.pool.num_used == 4


def test_full_pages_are_never_copied() -> None:
    scheduler = Scheduler(**SIZES)
    scheduler.add(*make_requests("a", [*range(1, 9)], 4))
    commit(scheduler, schedule(scheduler))
    plan = schedule(scheduler)
    assert len(plan.copies) == 0 and scheduler.pool.num_used == 2 + 4


def test_eight_samples_of_256_tokens_take_few_pages() -> None:
    scheduler = Scheduler(num_pages=400, page_size=16, max_model_len=512, max_num_seqs=8, max_num_batched_tokens=512)
    for prompt, shared, own in ((256, 16, 2), (250, 15, 2)):
        samples = make_requests("a", [*range(1, prompt + 1)], 8, max_tokens=20)
        scheduler.add(*samples)
        computed = most = copied = 0
        while scheduler.has_work:
            plan = schedule(scheduler)
            computed += int(plan.counts.sum())
            copied += len(plan.copies)
            most = max(most, scheduler.pool.num_used)
            commit(scheduler, plan)
        assert computed <= prompt + 8 * 19, "the second prompt finds pages of the first"
        assert most == shared + 8 * own and copied == (7 if prompt % 16 else 0)


def test_those_who_follow_have_rows_when_the_prompt_is_computed() -> None:
    scheduler = Scheduler(**SIZES | {"max_num_batched_tokens": 4})
    scheduler.add(*make_requests("a", [*range(1, 9)], 3))
    scheduler.add(*make_requests("b", [1], 2))
    commit(scheduler, schedule(scheduler))
    assert scheduler.table.num_free_rows == 1
    plan = schedule(scheduler)
    assert len(plan.sampled) == 3
    commit(scheduler, plan)
    assert [r.request_id for r in schedule(scheduler).requests] == ["a", "a", "a"], "one row is free, but b needs two"


def test_more_samples_than_rows() -> None:
    scheduler = Scheduler(**SIZES)
    samples = make_requests("a", [*range(1, 10)], 9, max_tokens=3)
    scheduler.add(*samples)
    computed = 0
    while scheduler.has_work:
        plan = schedule(scheduler)
        assert len(plan.sampled) <= 4
        computed += int(plan.counts.sum())
        commit(scheduler, plan)
    assert [r.output_token_ids for r in samples] == [[9] * 3] * 9
    assert computed == 9 + 1 + 1 + 9 * 2, "the later leaders find the two full pages"


def test_a_sequence_that_ends_leaves_its_pages_to_the_others() -> None:
    scheduler = Scheduler(**SIZES)
    samples = make_requests("a", [*range(1, 7)], 3)
    scheduler.add(*samples)
    commit(scheduler, schedule(scheduler), [0, 5, 0])
    assert [r.finish_reason for r in samples] == ["stop", None, "stop"]
    plan = schedule(scheduler)
    assert (plan.requests, plan.copies.tolist(), scheduler.pool.num_used) == ([samples[1]], [], 2), "alone it need not copy"


@pytest.mark.parametrize("when", ["waiting", "prefilling", "in flight", "forked"])
def test_abort_ends_all_samples(when: str) -> None:
    scheduler = Scheduler(**SIZES | {"max_num_batched_tokens": 4})
    samples = make_requests("a", [*range(1, 7)], 3)
    scheduler.add(*samples)
    if when != "waiting":
        commit(scheduler, schedule(scheduler))
    plan = schedule(scheduler) if when in ("in flight", "forked") else None
    if when == "forked":
        commit(scheduler, plan)
    assert scheduler.abort("a") and not scheduler.abort("a")
    scheduler.check()
    if when == "in flight":
        commit(scheduler, plan)
    assert {(r.status, r.finish_reason, r.row) for r in samples} == {(RequestStatus.FINISHED, "abort", -1)}
    assert not scheduler.has_work and scheduler.pool.num_used == 0 and scheduler.table.num_free_rows == 4


def test_a_preempted_leader_takes_its_followers_along() -> None:
    scheduler = Scheduler(**SIZES | {"num_pages": 6, "max_num_batched_tokens": 8})
    (old,) = make_requests("old", [7] * 4, 1, max_tokens=12)
    samples = make_requests("a", [*range(1, 13)], 2)
    scheduler.add(old)
    scheduler.add(*samples)
    commit(scheduler, schedule(scheduler))
    scheduler.preempt(samples[0])
    scheduler.check()
    assert [r.status.value for r in samples] == ["waiting", "following"] and scheduler.table.num_free_rows == 3
    while scheduler.has_work:
        commit(scheduler, schedule(scheduler))
    assert [r.output_token_ids for r in samples] == [[9] * 4] * 2


def test_a_copy_of_a_preempted_sequence_is_not_made() -> None:
    """Each of two samples wants a page of its own, but there is one: the younger one gives up what it was promised."""
    scheduler = Scheduler(**SIZES | {"num_pages": 3})
    samples = make_requests("a", [*range(1, 8)], 2, max_tokens=4)
    scheduler.add(*samples)
    commit(scheduler, schedule(scheduler), [11, 12])
    plan = schedule(scheduler)
    assert plan.requests == samples and len(plan.copies) == 1
    commit(scheduler, plan)
    plan = schedule(scheduler)
    assert plan.requests == samples[:1] and len(plan.copies) == 0 and samples[1].metrics.num_preemptions == 1
    commit(scheduler, plan)
    while scheduler.has_work:
        commit(scheduler, schedule(scheduler))
    assert [len(r.output_token_ids) for r in samples] == [4, 4]
