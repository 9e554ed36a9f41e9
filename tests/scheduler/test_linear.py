"""What a step costs the host, in operations instead of time: it grows with the rows, and not with those that wait."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pjax.outputs import RequestMetrics
from pjax.params import SamplingParams
from pjax.runner.batch import find_bucket, make_buckets, pack
from pjax.sampling.parameters import SamplingTable
from pjax.scheduler import Request, Scheduler


def make_request(number: int, prompt: int = 5, max_tokens: int = 40) -> Request:
    return Request(
        request_id=str(number),
        prompt_token_ids=[1 + (number + i) % 50 for i in range(prompt)],
        params=SamplingParams(),
        max_tokens=max_tokens,
        stop_token_ids=frozenset(),
        eos_token_ids=frozenset(),
        seed=0,
        metrics=RequestMetrics(arrival_time=float(number)),
    )


def count_lines(call: Callable[[], Any]) -> int:
    """Lines of Python that a call executes."""
    lines = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


def full(rows: int, waiting: int = 0) -> tuple[Scheduler, Callable[[], None]]:
    """A scheduler whose rows all decode, and its step."""
    budget = rows * 8
    scheduler = Scheduler(num_pages=rows * 4, page_size=16, max_model_len=64, max_num_seqs=rows, max_num_batched_tokens=budget)
    buckets, sampling = make_buckets(rows, budget), SamplingTable(rows)
    for number in range(rows + waiting):
        scheduler.add(make_request(number))

    def step() -> None:
        plan = scheduler.schedule(0.0)
        assert plan is not None
        for request in plan.sampled:
            sampling.set(request.row, request, request.params, request.seed)
        bucket = find_bucket(buckets, plan.num_tokens, len(plan.rows), plan.num_decode == len(plan.rows))
        pack(plan, scheduler.table.tokens, sampling, bucket)
        scheduler.commit(plan, np.full(len(plan.sampled), 7), 0.0)

    for _ in range(3):
        step()
    assert scheduler.num_running == rows
    return scheduler, step


def test_a_step_grows_with_the_rows() -> None:
    few, many = (count_lines(full(rows)[1]) for rows in (64, 512))
    assert few > 64 and many < 8.5 * few, (few, many)


def test_ending_all_rows_grows_with_the_rows() -> None:
    def lines(rows: int) -> int:
        scheduler, _ = full(rows)
        return count_lines(lambda: [scheduler.abort(str(number)) for number in range(rows)])

    few, many = lines(64), lines(512)
    assert few > 64 and many < 8.5 * few, (few, many)


@pytest.mark.parametrize("waiting", [10, 3000])
def test_those_that_wait_do_not_slow_a_step(waiting: int) -> None:
    assert count_lines(full(64, waiting)[1]) < count_lines(full(64)[1]) + 64


def test_those_that_wait_do_not_slow_ends_starts_and_preemptions() -> None:
    def lines(waiting: int) -> int:
        scheduler, step = full(64, waiting)

        def turn() -> None:
            for number in range(4):
                scheduler.abort(str(number))
                scheduler.abort(str(64 + 2 * number))  # of those that wait
            scheduler.preempt(scheduler.running.last)
            step()

        return count_lines(turn)

    few, many = lines(30), lines(6000)
    assert few > 64 and many < 1.2 * few, (few, many)
