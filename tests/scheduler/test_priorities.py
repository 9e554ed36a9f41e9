"""Who is served first, and who ends at a deadline."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjax.outputs import RequestMetrics
from pjax.params import SamplingParams
from pjax.scheduler import Request, RequestStatus, Scheduler
from pjax.scheduler.queues import RemovableHeap
from tests.budget import examples

SIZES = {"num_pages": 64, "page_size": 4, "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 16}


def make_request(
    name: str, prompt: int = 4, max_tokens: int = 4, *, priority: int = 0, arrival: float = 0.0, deadline: float | None = None
) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(range(2, 2 + prompt)),
        params=SamplingParams(),
        max_tokens=max_tokens,
        stop_token_ids=frozenset(),
        eos_token_ids=frozenset(),
        seed=0,
        metrics=RequestMetrics(arrival_time=arrival),
        priority=priority,
        deadline=deadline,
    )


def step(scheduler: Scheduler, now: float = 0.0) -> list[str]:
    plan = scheduler.schedule(now)
    scheduler.check()
    if plan is None:
        return []
    scheduler.commit(plan, [9] * len(plan.sampled), now)
    scheduler.check()
    return [request.request_id for request in plan.requests]


def test_the_lower_number_is_served_earlier_and_equal_ones_as_they_came() -> None:
    scheduler = Scheduler(**SIZES)
    for name, priority in (("a", 1), ("b", 0), ("c", 0), ("d", -3), ("e", 1), ("f", -3)):
        scheduler.add(make_request(name, max_tokens=1, priority=priority))
    assert [step(scheduler) for _ in range(3)] == [["d", "f"], ["b", "c"], ["a", "e"]]


def test_the_poorest_priority_is_preempted_first() -> None:
    scheduler = Scheduler(**SIZES | {"num_pages": 4})
    scheduler.add(make_request("poor", 7, 8, priority=5))
    assert step(scheduler) == ["poor"]
    scheduler.add(make_request("good", 7, 8, priority=-5))
    assert step(scheduler) == ["poor", "good"], "the row of one token first"
    while step(scheduler) == ["good", "poor"]:
        pass
    good, poor = (scheduler.unfinished[name][0] for name in ("good", "poor"))
    assert (good.metrics.num_preemptions, poor.metrics.num_preemptions) == (0, 1), "though the poor one came first"
    while scheduler.has_work:
        step(scheduler)
    assert good.metrics.num_preemptions == 0


def test_a_level_of_priority_is_worth_so_much_waiting() -> None:
    scheduler = Scheduler(**SIZES | {"max_num_seqs": 1}, seconds_per_priority=10.0)
    for name, priority, arrival in (("old", 2, 0.0), ("new", 0, 19.0), ("newer", 0, 20.0), ("newest", 0, 20.5)):
        scheduler.add(make_request(name, max_tokens=1, priority=priority, arrival=arrival))
    assert [step(scheduler) for _ in range(4)] == [["new"], ["old"], ["newer"], ["newest"]]


@settings(max_examples=examples(40), deadline=None)
@given(seed=st.integers(0, 2**32), levels=st.integers(1, 4), per_level=st.floats(0.5, 8.0), num_pages=st.integers(5, 12))
def test_nobody_starves_under_endless_load_of_better_priorities(seed: int, levels: int, per_level: float, num_pages: int) -> None:
    """More work comes than can be done, all of it of a better priority. One that came before is passed by few."""
    rng = random.Random(seed)
    scheduler = Scheduler(**SIZES | {"num_pages": num_pages}, seconds_per_priority=per_level)
    poor = make_request("poor", 9, 8, priority=levels, arrival=0.0)
    scheduler.add(poor)
    arrivals, short = dict[str, float](), set[str]()
    now, number = 0.0, 0
    while poor.status is not RequestStatus.FINISHED:
        for _ in range(2):
            number += 1
            request = make_request(str(number), rng.randint(1, 9), rng.randint(1, 8), priority=rng.randrange(levels), arrival=now)
            scheduler.add(request)
            arrivals[request.request_id] = now
            if request.num_tokens <= 3:  # a fourth of 16 - 2
                short.add(request.request_id)
        started = set(step(scheduler, now))
        late = {name for name in started - short - {"poor"} if arrivals[name] > per_level * levels}
        first = all(name == "poor" or arrivals[name] > per_level * levels for name in scheduler.unfinished)
        if first and poor.status is RequestStatus.RUNNING:
            assert "poor" in started, "it is first in rank, so it advances in every step"
        assert not late or poor.status is not RequestStatus.WAITING, "passed by one that came after its time"
        now += 1.0
        assert number < 10_000


def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    scheduler = Scheduler(**SIZES)
    requests = {name: make_request(name, 5, 20, deadline=deadline) for name, deadline in (("runs", 3.0), ("waits", 2.0), ("stays", None))}
    for name in ("runs", "stays", "waits"):
        scheduler.add(requests[name])
    step(scheduler)
    assert scheduler.expire(1.9) == []
    assert scheduler.expire(2.0) == ["waits"] and requests["waits"].output_token_ids == []
    plan = scheduler.schedule()
    assert plan is not None and scheduler.expire(9.0) == ["runs"], "while a step is computed"
    assert scheduler.commit(plan, [9, 9], 9.0) == [requests["stays"]]
    scheduler.check()
    runs = requests["runs"]
    assert (runs.finish_reason, runs.output_token_ids, runs.row, runs.metrics.finished_time) == ("timeout", [9], -1, 9.0)
    assert scheduler.expire(1e9) == [] and scheduler.abort("stays")
    assert scheduler.pool.num_used == 0 and not scheduler.has_work


def test_deadlines_of_ended_requests_are_not_kept() -> None:
    scheduler = Scheduler(**SIZES)
    for number in range(1000):
        scheduler.add(make_request(str(number), deadline=1e9))
        scheduler.abort(str(number))
    assert len(scheduler.deadlines) == 0 and len(scheduler.deadlines._heap) <= 65
    scheduler.add(make_request("7", deadline=None))
    assert scheduler.expire(2e9) == [], "another of the same id has none"


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "add", "pop", "remove"]), st.integers(0, 5), st.integers(0, 20)), max_size=300))
def test_the_heap_is_a_sorted_list(operations: list[tuple[str, int, int]]) -> None:
    heap: RemovableHeap[int] = RemovableHeap()
    model: dict[int, tuple[int, int]] = {}
    for serial, (what, key, item) in enumerate(operations):
        if what == "add" and item not in model:
            heap.add(item, key)
            model[item] = key, serial
        elif what == "pop" and model:
            first = min(model, key=lambda one: model[one])
            assert (heap.smallest, heap.pop()) == (model.pop(first)[0], first)
        elif what == "remove" and item in model:
            heap.remove(item)
            del model[item]
        assert set(heap) == set(model) and len(heap) == len(model)
        assert len(heap._heap) <= 2 * len(model) + 66


def test_ten_thousand_that_wait_cost_few_comparisons() -> None:
    """Adding, preempting into and aborting from a long queue: comparisons grow with its logarithm, not its length."""

    class Key(int):
        count = 0

        def __lt__(self, other: object) -> bool:
            Key.count += 1
            return int.__lt__(self, other)  # type: ignore[operator]

    heap: RemovableHeap[int] = RemovableHeap()
    size, rng = 10_000, random.Random(0)
    for item in range(size):
        heap.add(item, Key(rng.randrange(size)))
    Key.count = 0
    for item in range(1000):
        heap.add(size + item, Key(rng.randrange(size)))
        heap.pop()
    assert Key.count < 1000 * 40
    Key.count = 0
    for item in list(heap)[:9000]:
        heap.remove(item)
    heap.pop()
    assert Key.count < 9000 * 6, "dead entries are cleared a few times, each time at half the cost"


@pytest.mark.parametrize("count", [1, 3])
def test_preempted_ones_come_back_to_their_place(count: int) -> None:
    scheduler = Scheduler(**SIZES | {"max_num_seqs": count})
    for number in range(20):
        scheduler.add(make_request(str(number), priority=number % 2))
    first = step(scheduler)
    for request in list(scheduler.running):
        scheduler.preempt(request)
    scheduler.check()
    assert step(scheduler) == first
