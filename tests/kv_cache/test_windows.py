"""Groups of layers with a window: which pages they let go, keep, find again and save; small cases with exact pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pjax.errors import UnsupportedError
from pjax.kv_cache.layout import NULL_PAGE, KVCacheGroup, KVCacheLayout, KVCacheSpec, make_layout, specs_of
from pjax.scheduler import Request, Scheduler
from tests.scheduler import common

MIXED = KVCacheLayout((KVCacheGroup((0,)), KVCacheGroup((1,), 6)), 1, 1)


def make_request(name: str, prompt: list[int], max_tokens: int = 20, priority: int = 0) -> Request:
    return common.make_request(name, prompt, max_tokens, priority=priority)


def make_scheduler(layout: KVCacheLayout = MIXED, **changes: Any) -> Scheduler:
    sizes = {"num_pages": 21, "page_size": 4, "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 16}
    return Scheduler(**sizes | changes, layout=layout)


def step(scheduler: Scheduler) -> list[int]:
    """Runs a step; how many tokens each row computed."""
    plan = scheduler.schedule(0.0)
    assert plan is not None
    scheduler.check()
    scheduler.commit(plan, [9] * len(plan.sampled), 0.0)
    scheduler.check()
    return plan.counts.tolist()


def tables_of(scheduler: Scheduler, request: Request, count: int) -> list[list[int]]:
    return scheduler.block_tables.ids[:, request.row, :count].tolist()


def test_pages_behind_the_window_are_freed_and_the_null_page_stands_for_them() -> None:
    scheduler = make_scheduler()
    request = make_request("a", [*range(1, 15)])
    scheduler.add(request)
    assert step(scheduler) == [14]
    assert tables_of(scheduler, request, 4) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert step(scheduler) == [1], "position 14 sees positions 9 to 14"
    assert tables_of(scheduler, request, 4) == [[1, 2, 3, 4], [NULL_PAGE, NULL_PAGE, 7, 8]]
    assert scheduler.pool.num_used == 6
    for _ in range(3):
        step(scheduler)
    assert scheduler.kv.pages_of(request) == [1, 2, 3, 4, 9], "unused pages come before those that may be found again"
    assert scheduler.kv.pages_of(request, 1) == [8, 10], "position 17 sees positions 12 to 17"


def test_a_prompt_in_chunks_never_has_more_pages_than_it_was_admitted_with() -> None:
    """16 pages of the full group for 63 tokens, and of the other group those of 5 tokens before a chunk of 16, wherever it begins."""
    scheduler = make_scheduler(num_pages=24)
    assert scheduler.kv.num_pages_for(63) == 16 + 7
    with_one_less = make_scheduler(num_pages=23)
    with pytest.raises(Exception, match=r"prompt and max_tokens need 23 pages .* but the page pool has 22"):
        with_one_less.add(make_request("a", [*range(1, 63)], 2))
    request = make_request("a", [*range(1, 63)], 2)
    scheduler.add(request)
    used = []
    while scheduler.has_work:
        step(scheduler)
        used.append(scheduler.pool.num_used)
    assert request.finish_reason == "length" and request.metrics.num_preemptions == 0
    assert max(used) <= 23


def test_a_prefix_needs_the_full_groups_pages_and_the_windows_last_ones() -> None:
    scheduler = make_scheduler()
    prompt = [*range(1, 26)]
    scheduler.add(make_request("a", prompt, 1))
    while scheduler.has_work:
        step(scheduler)
    kv, pool = scheduler.kv, scheduler.pool
    probe = make_request("b", prompt)
    cached = kv.find_cached(probe)
    assert (cached.num_tokens, cached.runs[0].first, len(cached.runs[0].ids)) == (24, 0, 6)
    assert (cached.runs[1].first, len(cached.runs[1].ids)) == (4, 2), "position 24 sees positions 19 to 24"

    pool.unname(cached.runs[1].ids[0])
    shorter = kv.find_cached(make_request("c", prompt))
    assert (shorter.num_tokens, shorter.runs[1].first) == (16, 2), "page 4 of the window group is missing: its pages 2 and 3 end a prefix"
    assert len(shorter.runs[0].ids) == 4 and len(shorter.runs[1].ids) == 2

    pool.unname(shorter.runs[0].ids[1])
    shortest = kv.find_cached(make_request("d", prompt))
    assert (shortest.num_tokens, [run.first for run in shortest.runs], [len(run.ids) for run in shortest.runs]) == (4, [0, 0], [1, 1])


def test_a_hole_in_a_windows_pages_is_not_skipped() -> None:
    scheduler = make_scheduler(KVCacheLayout((KVCacheGroup((0,), 10),), 1, 1), num_pages=9)
    prompt = [*range(1, 26)]
    scheduler.add(make_request("a", prompt, 1))
    while scheduler.has_work:
        step(scheduler)
    first = scheduler.kv.find_cached(make_request("b", prompt)).runs[0]
    assert (first.first, len(first.ids)) == (3, 3)
    scheduler.pool.unname(first.ids[1])
    found = scheduler.kv.find_cached(make_request("c", prompt))
    assert (found.num_tokens, found.runs[0].first) == (16, 1) and found.runs[0].ids[-1] == first.ids[0] and len(found.runs[0].ids) == 3


def test_what_is_saved_is_what_the_window_reaches() -> None:
    scheduler = make_scheduler(num_host_slots=20, preemption_mode="swap")
    request = make_request("a", [*range(1, 15)])
    scheduler.add(request)
    for _ in range(4):
        step(scheduler)
    held = [list(scheduler.kv.pages_of(request, group)) for group in (0, 1)]
    scheduler.preempt(request)
    pool = scheduler.pool
    pool.free(pool.allocate(pool.num_free))  # evicts all
    plan = scheduler.schedule(0.0)
    assert plan is not None and (plan.starts.tolist(), plan.counts.tolist()) == ([17], [1])
    assert plan.swap_outs[:, 0].tolist() == [*held[0], *held[1][1:]], "position 17 no longer sees the first of three"
    assert plan.swap_ins[:, 0].tolist() == plan.swap_outs[:, 1].tolist()
    assert plan.swap_ins[:, 1].tolist() == [*scheduler.kv.pages_of(request), *scheduler.kv.pages_of(request, 1)]
    scheduler.check()


@pytest.mark.parametrize(
    ("windows", "max_model_len", "groups"),
    [
        ([None] * 4, 99, [((0, 1, 2, 3), None)]),
        ([8] * 3, 99, [((0, 1, 2), 8)]),
        ([8] * 3, 8, [((0, 1, 2), None)]),
        ([4, None, 4, None], 99, [((1, 3), None), ((0, 2), 4)]),
        ([4, 4, 4, None, 4, 4, 4, None, 4], 99, [((3, 7), None), ((0, 1), 4), ((2, 4), 4), ((5, 6), 4), ((8,), 4)]),
        ([4] * 5 + [None] * 6, 99, [((5, 6, 7, 8, 9, 10), None), ((0, 1, 2, 3, 4), 4)]),
        ([4, 7, None], 99, [((2,), None), ((0,), 4), ((1,), 7)]),
    ],
)
def test_groups(windows: list[int | None], max_model_len: int, groups: list[tuple[tuple[int, ...], int | None]]) -> None:
    layout = make_layout([KVCacheSpec(num_kv_heads=2, head_size=8, sliding_window=window) for window in windows], max_model_len)
    assert [(group.layers, group.sliding_window) for group in layout.groups] == groups
    assert sorted(layout.places) == list(range(len(windows))) and len(set(layout.places.values())) == len(windows)
    assert layout.num_reserved == any(window is not None for _, window in groups)


def test_layers_without_keys_and_values_are_in_no_group() -> None:
    spec = KVCacheSpec(num_kv_heads=2, head_size=8)
    layout = make_layout([None, spec, None, spec], 99)
    assert layout.places == {1: (0, 0), 3: (0, 1)} and layout.page_bytes(16, 2) == 2 * 2 * 16 * 2 * 8 * 2


def test_layers_whose_pages_differ_in_size_are_refused() -> None:
    specs = [KVCacheSpec(num_kv_heads=2, head_size=8), KVCacheSpec(num_kv_heads=1, head_size=32)]
    with pytest.raises(UnsupportedError, match=r"KV caches of the layers are 1 heads of 32, 2 heads of 8, but must be of one size"):
        make_layout(specs, 99)


@pytest.mark.parametrize(
    ("layout", "num_pages", "limit", "tokens"),
    [
        (KVCacheLayout.uniform(2), 10, 99, 40),
        (KVCacheLayout.uniform(2), 10, 39, 39),
        (MIXED, 24, 99, 64),
        (MIXED, 23, 99, 60),
        (KVCacheLayout((KVCacheGroup((0,), 6),), 1, 1), 8, 1000, 1000),
        (KVCacheLayout((KVCacheGroup((0,), 6),), 1, 1), 7, 1000, 24),
    ],
)
def test_the_longest_sequence_that_fits(layout: KVCacheLayout, num_pages: int, limit: int, tokens: int) -> None:
    assert layout.max_tokens_in(num_pages, 4, 16, limit) == tokens


def test_a_saved_sequence_does_not_count_on_cached_pages_that_its_window_has_passed() -> None:
    """Others own the first pages of its prefix, so giving them up frees nothing."""
    layout = KVCacheLayout((KVCacheGroup((0,)), KVCacheGroup((1,), 41)), 1, 1)
    sizes = {"num_pages": 53, "max_model_len": 160, "max_num_seqs": 3, "max_num_batched_tokens": 4}
    scheduler = make_scheduler(layout, **sizes, num_host_slots=500, preemption_mode="swap")
    saved = make_request("a", [*range(1, 101)], 60, 9)
    scheduler.add(saved)
    while saved.num_computed < 104:
        step(scheduler)
    scheduler.add(make_request("b", [*range(1, 21), 500], 60))
    step(scheduler)
    scheduler.add(make_request("c", [*range(1000, 1008)], 1))
    while scheduler.has_work:
        step(scheduler)
    assert saved.metrics.num_preemptions > 0 and len(saved.output_token_ids) == 60


def test_restoring_takes_all_pages_or_none() -> None:
    scheduler = make_scheduler(num_host_slots=20, preemption_mode="swap")
    request = make_request("a", [*range(1, 15)])
    scheduler.add(request)
    step(scheduler)
    scheduler.preempt(request)
    pool = scheduler.pool
    pool.forget()
    taken = pool.allocate(pool.num_free - 5)  # enough for one group's four pages, not for the other's too
    with pytest.raises(MemoryError):
        scheduler.kv.start(request, scheduler.kv.find_cached(request))
    assert pool.num_free == 5
    pool.free(taken)


def test_half_of_a_prefix_is_evicted_in_all_groups_alike() -> None:
    """28 tokens are 7 pages of each group; when 8 are taken by others, the first 3 of each are left."""
    layout = KVCacheLayout((KVCacheGroup((0,)), KVCacheGroup((1,), 99)), 1, 1)
    scheduler = make_scheduler(layout, num_pages=15, max_num_batched_tokens=28)
    prompt = [*range(1, 29)]
    scheduler.add(make_request("a", prompt, 1))
    while scheduler.has_work:
        step(scheduler)
    scheduler.pool.free(scheduler.pool.allocate(8))
    assert scheduler.kv.find_cached(make_request("b", prompt)).num_tokens == 12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": (4, None)}, "sliding_window has 2 values, but must have one for each of the 3 layers"),
        ({"kv_cache_specs": (None,)}, "kv_cache_specs has 1 values, but must have one for each of the 3 layers"),
    ],
)
def test_a_config_says_it_for_each_layer(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        specs_of(SimpleNamespace(num_layers=3, num_kv_heads=1, head_size=8, **fields))


def test_windows_of_a_config() -> None:
    config = SimpleNamespace(num_layers=3, num_kv_heads=1, head_size=8, sliding_window=[4, None, 4])
    assert [spec and spec.sliding_window for spec in specs_of(config)] == [4, None, 4]
