"""Prefix caching on small plans: what is found, what is computed, who goes first when pages run out."""

from __future__ import annotations

import numpy as np
import pytest

from pjax.kv_cache.page_pool import PagePool
from pjax.kv_cache.prefix import page_keys
from pjax.scheduler import Request, Scheduler
from tests.scheduler import common

SIZES = {"num_pages": 64, "page_size": 4, "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16}
Row = tuple[str, int, int, bool]  # request, start, count, whether it samples


def make_request(name: str, prompt: list[int], max_tokens: int = 2, salt: str | None = None) -> Request:
    return common.make_request(name, prompt, max_tokens, cache_salt=salt)


def step(scheduler: Scheduler, token: int = 9) -> list[Row]:
    plan = scheduler.schedule()
    scheduler.check()
    if plan is None:
        return []
    samples = [request in plan.sampled for request in plan.requests]
    rows = list(zip((r.request_id for r in plan.requests), plan.starts.tolist(), plan.counts.tolist(), samples))
    scheduler.commit(plan, [token] * len(plan.sampled), 1.0)
    scheduler.check()
    return rows


def run(scheduler: Scheduler, *requests: Request) -> list[list[Row]]:
    for request in requests:
        scheduler.add(request)
    steps = []
    while scheduler.has_work:
        steps.append(step(scheduler))
    return steps


def test_a_prompt_seen_before_begins_behind_its_full_pages() -> None:
    scheduler = Scheduler(**SIZES)
    a, b, c = (make_request(name, prompt) for name, prompt in (("a", [*range(10)]), ("b", [*range(9), 50]), ("c", [*range(7), 50, 60])))
    assert run(scheduler, a) == [[("a", 0, 10, True)], [("a", 10, 1, True)]]
    assert run(scheduler, b) == [[("b", 8, 2, True)], [("b", 10, 1, True)]]
    assert run(scheduler, c) == [[("c", 4, 5, True)], [("c", 9, 1, True)]]
    assert [r.num_cached_tokens for r in (a, b, c)] == [0, 8, 4]


def test_generated_tokens_are_found_too() -> None:
    scheduler = Scheduler(**SIZES)
    run(scheduler, make_request("a", [1, 2, 3], max_tokens=7))
    follow_up = make_request("b", [1, 2, 3, *[9] * 7, 5])
    assert run(scheduler, follow_up)[0] == [("b", 8, 3, True)], "the tenth token was sampled, but never computed"


@pytest.mark.parametrize(("length", "start"), [(4, 0), (5, 4), (8, 4), (9, 8)])
def test_the_last_token_of_a_cached_prompt_is_computed(length: int, start: int) -> None:
    scheduler = Scheduler(**SIZES)
    run(scheduler, make_request("a", [*range(16)]))
    again = make_request("b", [*range(length)])
    assert run(scheduler, again)[0] == [("b", start, length - start, True)]
    assert again.num_cached_tokens == start


def test_a_prefix_of_many_prompts_is_computed_once_though_they_come_together() -> None:
    """384 tokens, 16 requests, budgets below and above the prefix."""
    for budget in (32, 100, 512, 4096):
        sizes = {"num_pages": 200, "page_size": 16, "max_model_len": 512, "max_num_seqs": 16, "max_num_batched_tokens": budget}
        scheduler = Scheduler(**sizes)
        requests = [make_request(str(i), [*range(384), 1000 + i, 2000 + i]) for i in range(16)]
        steps = run(scheduler, *requests)
        computed = sum(count for rows in steps for _, start, count, _ in rows if start < 384)
        assert computed in (384, 386), f"budget {budget}: the first row's chunk may end behind the prefix"
        assert [r.num_cached_tokens for r in requests] == [0] + [384] * 15


def test_a_row_of_the_same_step_finds_pages_that_are_just_computed() -> None:
    scheduler = Scheduler(**SIZES | {"max_num_batched_tokens": 20})
    for request in (make_request("a", [*range(10)]), make_request("b", [*range(8), 50])):
        scheduler.add(request)
    plan = scheduler.schedule()
    assert plan is not None and [r.request_id for r in plan.requests] == ["b", "a"]
    assert (plan.starts.tolist(), plan.counts.tolist()) == ([8, 0], [1, 10])
    tables = scheduler.block_tables.ids[0]
    assert tables[plan.rows[0], :2].tolist() == tables[plan.rows[1], :2].tolist()


def test_a_failed_step_leaves_nothing_that_others_would_rely_on() -> None:
    scheduler = Scheduler(**SIZES)
    scheduler.add(make_request("a", [*range(10)]))
    assert scheduler.schedule() is not None
    scheduler.preempt_all()  # as the engine does when the step raises
    scheduler.abort("a")
    scheduler.check()
    assert run(scheduler, make_request("b", [*range(10)]))[0] == [("b", 0, 10, True)]


def test_a_preempted_request_finds_what_it_had() -> None:
    scheduler = Scheduler(**SIZES | {"num_pages": 5})
    a, b = make_request("a", [1] * 7, 8), make_request("b", [2] * 7, 4)
    scheduler.add(a)
    scheduler.add(b)
    rows = [step(scheduler) for _ in range(3)]
    assert rows[2] == [("a", 8, 1, True)] and b.metrics.num_preemptions == 1
    while b.finish_reason is None:
        rows.append(step(scheduler))
    resumed = next(row for later in rows[3:] for row in later if row[0] == "b")
    assert resumed == ("b", 4, 5, True), "its second page went to a, its first one was still there"
    assert b.num_cached_tokens == 0, "as it was when b first ran"


def test_salts_separate() -> None:
    scheduler = Scheduler(**SIZES)
    prompt = [*range(10)]
    run(scheduler, make_request("a", prompt, salt="x"))
    starts = [run(scheduler, make_request("b", prompt, salt=salt))[0][0][1] for salt in (None, "y", "x", "y", None)]
    assert starts == [0, 0, 8, 8, 8]


def test_caching_can_be_off() -> None:
    scheduler = Scheduler(**SIZES, enable_prefix_caching=False)
    for name in "ab":
        assert run(scheduler, make_request(name, [*range(10)]))[0] == [(name, 0, 10, True)]


def test_the_page_unused_for_longest_is_evicted_first() -> None:
    scheduler = Scheduler(**SIZES | {"num_pages": 6})
    one, two, three = ([n] * 9 for n in (1, 2, 3))
    for prompt in (one, two, one):
        run(scheduler, make_request("r", prompt, 1))
    run(scheduler, make_request("r", three, 1))  # its two full pages take those of `two`, the oldest; the end of it first
    starts = {n: scheduler.kv.find_cached(make_request("f", prompt)) for n, prompt in ((1, one), (2, two), (3, three))}
    assert {n: len(found.runs[0].ids) for n, found in starts.items()} == {1: 2, 2: 1, 3: 2}


def test_keys_tell_tokens_positions_and_salts_apart() -> None:
    prompts = [([1, 2, 3, 4], None), ([3, 4, 1, 2], None), ([1, 2, 3, 4], "s"), ([1, 2, 3, 4], "t"), ([1, 2, 1, 2], None)]
    keys = [page_keys(make_request("r", prompt, salt=salt), 2, 2) for prompt, salt in prompts]
    assert len({key for pair in keys for key in pair}) == 9, "only [1, 2] at the start, unsalted, comes twice"
    request = make_request("r", [1, 2, 3])
    first = list(page_keys(request, 2, 1))
    request.output_token_ids += [4, 5]
    assert page_keys(request, 2, 2) == [*first, keys[0][1]]


# ---- the pool


def test_keys_of_pages() -> None:
    pool = PagePool(3)
    a, b = pool.allocate(2)
    pool.remember(a, "A")
    pool.remember(b, "A")
    assert pool.find("A") == a, "who came first keeps the key"
    pool.free([a, b])
    assert (pool.find("A"), pool.num_free) == (a, 3)
    pool.reuse([a])
    assert pool.num_owners(a) == 1
    pool.reuse([a])
    assert pool.num_owners(a) == 2
    with pytest.raises(ValueError, match=f"page {b} has no owner"):
        pool.reuse([a, b])
    assert pool.num_owners(a) == 2
    with pytest.raises(ValueError, match=f"page {b} has no owner"):
        pool.remember(b, "B")
    pool.free([a, a])
    assert sorted(pool.allocate(3)) == [0, 1, 2]
    assert pool.find("A") is None
    pool.check()


def test_forgotten_pages_are_free() -> None:
    pool = PagePool(4)
    pages = pool.allocate(3)
    for page in pages:
        pool.remember(page, page)
    pool.free(pages[:2])
    pool.forget()
    pool.check()
    assert [pool.find(page) for page in pages] == [None] * 3 and pool.num_free == 3
    pool.free(pages[2:])
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]


def test_pages_are_evicted_in_the_order_of_their_last_use() -> None:
    pool = PagePool(1000)
    pages = pool.allocate(1000)
    for page in pages:
        pool.remember(page, page)
    pool.free(pages)
    order = np.random.default_rng(0).permutation(pages).tolist()
    for page in order:  # used once more
        pool.reuse([page])
        pool.free([page])
    assert pool.allocate(1000) == order
