"""Short prompts do not wait for the chunks of long ones, and long ones do not starve for it."""

from __future__ import annotations

from typing import Any

import pytest

from pjax.scheduler import RequestStatus, Scheduler
from tests.scheduler.test_priorities import make_request

# The fourth of 68 - 4 that short prompts get is a page of 16 tokens.
SIZES = {"num_pages": 1000, "page_size": 16, "max_model_len": 1000, "max_num_seqs": 4, "max_num_batched_tokens": 68}


def make(*long: int, **sizes: Any) -> Scheduler:
    """A scheduler with long prompts of so many tokens, the first of them one step on."""
    scheduler = Scheduler(**SIZES | sizes, enable_prefix_caching=False)
    for number, size in enumerate(long):
        scheduler.add(make_request(f"long {number}", size))
    assert step(scheduler) == {"long 0": 68}
    return scheduler


def step(scheduler: Scheduler) -> dict[str, int]:
    """Plans and commits a step; the tokens of each request in it."""
    plan = scheduler.schedule(0.0)
    scheduler.check()
    if plan is None:
        return {}
    scheduler.commit(plan, [9] * len(plan.sampled), 0.0)
    scheduler.check()
    return {request.request_id: int(count) for request, count in zip(plan.requests, plan.counts, strict=True)}


def test_a_short_prompt_is_computed_in_the_next_step() -> None:
    scheduler = make(300, 900, 900)
    scheduler.add(make_request("short", 5, 2))
    assert step(scheduler) == {"short": 5, "long 0": 63}
    assert step(scheduler) == {"short": 1, "long 0": 67}
    assert step(scheduler) == {"long 0": 68}, "nothing is kept for nobody"


def test_with_a_step_under_way_as_well() -> None:
    scheduler = make(300, 900)
    under_way = scheduler.schedule(0.0)
    assert under_way is not None
    scheduler.add(make_request("short", 5, 2))
    plan = scheduler.schedule(0.0)
    assert plan is not None and [request.request_id for request in plan.sampled] == ["short"]
    scheduler.commit(under_way, [], 0.0)
    scheduler.commit(plan, [9], 0.0)
    assert scheduler.unfinished["short"][0].output_token_ids == [9]


def test_several_get_a_fourth_together_and_first_come_first_served() -> None:
    scheduler = make(900)
    for name, size in (("long 1", 900), ("a", 10), ("b", 16), ("c", 4), ("too long", 17)):
        scheduler.add(make_request(name, size, 1))
    assert step(scheduler) == {"a": 10, "long 0": 58}, "not c, which came later"
    assert step(scheduler) == {"b": 16, "long 0": 52}
    assert step(scheduler) == {"c": 4, "long 0": 64}
    assert step(scheduler) == {"long 0": 68}, "the last one is not short"


def test_what_has_begun_is_ended_first() -> None:
    scheduler = make(80)
    for name, size in (("a", 60), ("long 1", 900)):
        scheduler.add(make_request(name, size, 1))
    assert step(scheduler) == {"long 0": 12, "a": 56}
    assert step(scheduler) == {"a": 4, "long 1": 63, "long 0": 1}


def test_long_prompts_advance_however_many_short_ones_come() -> None:
    scheduler, number = make(900, 500), 0
    while "long 1" in scheduler.unfinished:
        for _ in range(3):
            number += 1
            scheduler.add(make_request(str(number), 1 + number % 16, 1 + number % 3))
        counts = step(scheduler)
        left = 68 - sum(count == 1 for count in counts.values())
        assert any(name.startswith("long") for name in counts)
        short = sum(count for name, count in counts.items() if not name.startswith("long") and count > 1)
        assert short <= left // 4 + 16, "a fourth, and one's last chunk"
        assert number < 200


@pytest.mark.parametrize("priority", [-1, 0, 1])
def test_a_better_priority_is_not_passed(priority: int) -> None:
    scheduler = Scheduler(**SIZES)
    scheduler.add(make_request("long 0", 200, priority=0))
    scheduler.add(make_request("long 1", 200, priority=0))
    step(scheduler)
    scheduler.add(make_request("short", 5, 1, priority=priority))
    assert ("short" in step(scheduler)) == (priority <= 0)


def test_the_first_of_those_that_wait_keeps_its_row() -> None:
    scheduler = make(300, 300, max_num_seqs=4)
    for name in "abc":
        scheduler.add(make_request(name, 4, 100))
    assert step(scheduler) == {"a": 4, "b": 4, "long 0": 60}, "four rows: one is left for long 1"
    assert scheduler.unfinished["c"][0].status is RequestStatus.WAITING


@pytest.mark.parametrize("waiting", [300, 303])
@pytest.mark.parametrize(("num_pages", "passes"), [(5 + 15 + 2 + 19 + 1, True), (5 + 15 + 2 + 19, False)])
def test_rows_and_the_first_of_those_that_wait_keep_their_pages(num_pages: int, passes: bool, waiting: int) -> None:
    """Five of the 19 pages for 300 tokens are computed; rounding and a copy take two more. The other one needs 19 with its first token."""
    scheduler = make(300, waiting, num_pages=num_pages)
    scheduler.add(make_request("short", 5, 1))
    assert ("short" in step(scheduler)) == passes
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.pool.num_used == 0
