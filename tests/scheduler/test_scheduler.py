"""The scheduler: small plans word for word, then random requests on a fake device that notices a lost or shared page."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pjax.errors import ConfigError, InvalidRequestError
from pjax.outputs import RequestMetrics
from pjax.params import SamplingParams
from pjax.scheduler import Request, RequestStatus, Scheduler, StepPlan
from tests.budget import examples

VOCAB, EOS, STOP = 16, 0, 1
SIZES = {"num_pages": 64, "page_size": 4, "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16}
Row = tuple[str, int, int, bool]  # request, start, count, whether it samples


def make_scheduler(*requests: Request, **changes: int) -> Scheduler:
    scheduler = Scheduler(**(SIZES | changes), enable_prefix_caching=False)  # tests/scheduler/test_prefix_caching.py has it on
    for request in requests:
        scheduler.add(request)
    return scheduler


def make_request(name: str, prompt: int | list[int], max_tokens: int = 8, *, eos: bool = False, stop: bool = False) -> Request:
    ids = list(range(2, 2 + prompt)) if isinstance(prompt, int) else prompt
    ends = {"stop_token_ids": frozenset([STOP] if stop else []), "eos_token_ids": frozenset([EOS] if eos else [])}
    metrics = RequestMetrics(arrival_time=0.0)
    return Request(request_id=name, prompt_token_ids=ids, params=SamplingParams(), max_tokens=max_tokens, seed=0, metrics=metrics, **ends)


def rows_of(plan: StepPlan) -> list[Row]:
    assert plan.rows.tolist() == [request.row for request in plan.requests]
    assert (plan.num_decode, plan.num_tokens) == (sum(count == 1 for count in plan.counts), sum(plan.counts))
    samples = [request in plan.sampled for request in plan.requests]
    assert plan.sample_sources.tolist() == np.flatnonzero(samples).tolist() and len(plan.copies) == 0
    assert plan.sample_rows.tolist() == [request.row for request in plan.sampled]
    return list(zip((r.request_id for r in plan.requests), plan.starts.tolist(), plan.counts.tolist(), samples, strict=True))


def step(scheduler: Scheduler, token: int = 9) -> list[Row]:
    """One step that samples `token`."""
    plan = scheduler.schedule()
    scheduler.check()
    if plan is None:
        return []
    rows = rows_of(plan)
    scheduler.commit(plan, [token] * len(plan.sampled), 1.0)
    scheduler.check()
    return rows


def test_a_long_prompt_comes_in_chunks() -> None:
    scheduler = make_scheduler(make_request("a", 10, 3, eos=True), max_num_batched_tokens=4)
    whole = [[("a", 0, 4, False)], [("a", 4, 4, False)], [("a", 8, 2, True)], [("a", 10, 1, True)], [("a", 11, 1, True)], []]
    assert [step(scheduler) for _ in range(6)] == whole


def test_decode_and_prefill_share_a_step() -> None:
    scheduler = make_scheduler(make_request("a", 3), max_num_batched_tokens=8)
    assert step(scheduler) == [("a", 0, 3, True)]
    for request in (make_request("b", 12), make_request("c", 2)):
        scheduler.add(request)
    assert step(scheduler) == [("a", 3, 1, True), ("b", 0, 7, False)]
    assert step(scheduler) == [("a", 4, 1, True), ("b", 7, 5, True), ("c", 0, 2, True)]
    assert step(scheduler) == [("a", 5, 1, True), ("b", 12, 1, True), ("c", 2, 1, True)]


def test_rows_of_one_token_come_first() -> None:
    scheduler = make_scheduler(make_request("a", 3), make_request("b", 6), make_request("c", 1), max_num_batched_tokens=4)
    assert step(scheduler) == [("b", 0, 1, False), ("a", 0, 3, True)], "b gets what a leaves of the budget"
    assert step(scheduler) == [("a", 3, 1, True), ("b", 1, 3, False)]
    assert step(scheduler) == [("a", 4, 1, True), ("c", 0, 1, True), ("b", 4, 2, True)]


def test_only_max_num_seqs_run() -> None:
    scheduler = make_scheduler(make_request("a", 2, 3), make_request("b", 2, 2), make_request("c", 2), make_request("d", 2), max_num_seqs=2)
    assert scheduler.waiting_lengths() == [2, 2, 2, 2]
    assert step(scheduler) == [("a", 0, 2, True), ("b", 0, 2, True)]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 2)
    assert step(scheduler) == [("a", 2, 1, True), ("b", 2, 1, True)]
    assert step(scheduler) == [("a", 3, 1, True), ("c", 0, 2, True)], "c has b's row"
    assert step(scheduler) == [("c", 2, 1, True), ("d", 0, 2, True)]


def test_who_came_first_is_not_overtaken() -> None:
    scheduler = make_scheduler(make_request("a", 6, 2), make_request("b", 12, 2), make_request("c", 1, 2), num_pages=5)
    assert step(scheduler) == [("a", 0, 6, True)], "with its first output b needs 4 of the 3 pages left; c would fit, but is younger"
    assert step(scheduler) == [("a", 6, 1, True)]
    assert step(scheduler) == [("c", 0, 1, True), ("b", 0, 12, True)]


def test_the_youngest_is_preempted_and_computed_again() -> None:
    a, b = make_request("a", 7, 5), make_request("b", 4, 4)
    scheduler = make_scheduler(a, b, num_pages=4)
    assert [step(scheduler) for _ in range(2)] == [[("a", 0, 7, True), ("b", 0, 4, True)], [("a", 7, 1, True), ("b", 4, 1, True)]]
    assert step(scheduler) == [("a", 8, 1, True)], "no page is left: a's third one is taken from b"
    assert (b.status, b.num_computed, b.row, b.num_tokens) == (RequestStatus.WAITING, 0, -1, 6)
    assert (a.metrics.num_preemptions, b.metrics.num_preemptions, scheduler.pool.num_used) == (0, 1, 3)
    assert [step(scheduler) for _ in range(2)] == [[("a", 9, 1, True)], [("a", 10, 1, True)]], "b waits for room for all it has"
    assert step(scheduler) == [("b", 0, 6, True)] and scheduler.table.tokens[b.row, :7].tolist() == [2, 3, 4, 5, 9, 9, 9]
    assert step(scheduler) == [("b", 6, 1, True)] and (b.output_token_ids, b.finish_reason) == ([9] * 4, "length")


def test_two_preempted_in_one_step_keep_their_order() -> None:
    scheduler = make_scheduler(*(make_request(name, 1, 4) for name in "abcd"), num_pages=8, page_size=1)
    assert [step(scheduler) for _ in range(2)] == [[(name, start, 1, True) for name in "abcd"] for start in (0, 1)]
    assert [step(scheduler) for _ in range(2)] == [[("a", start, 1, True), ("b", start, 1, True)] for start in (2, 3)]
    assert [step(scheduler) for _ in range(2)] == [[("c", 0, 3, True), ("d", 0, 3, True)], [("c", 3, 1, True), ("d", 3, 1, True)]]
    assert not scheduler.has_work


def test_a_prompt_in_chunks_is_preempted_for_an_older_row() -> None:
    scheduler = make_scheduler(
        make_request("a", 1, 8), make_request("b", 8, 2), num_pages=6, page_size=2, max_num_seqs=2, max_num_batched_tokens=2
    )
    assert [step(scheduler) for _ in range(6)] == [[("a", i, 1, True), ("b", i, 1, False)] for i in range(6)]
    assert [step(scheduler) for _ in range(2)] == [[("a", 6, 1, True)], [("a", 7, 1, True)]]
    assert [step(scheduler) for _ in range(6)] == [[("b", i, 2, i == 6)] for i in (0, 2, 4, 6)] + [[("b", 8, 1, True)], []]


REFUSED = [
    ("x", 0, 8, "prompt is empty, but must have at least 1 token (request 'x')"),
    ("x", 24, 8, "prompt has 24 tokens, but max_model_len is 24 and must leave room for one more (request 'x')"),
    ("x", 9, 9, "prompt and max_tokens need 5 pages (9 + 9 tokens), but the page pool has 4 (request 'x')"),
    ("x", 17, 99, "prompt and max_tokens need 6 pages (17 + 99 tokens), but the page pool has 4 (request 'x')"),
    ("used", 1, 1, "request_id 'used' is in use by an unfinished request"),
]


@pytest.mark.parametrize(("name", "prompt", "max_tokens", "message"), REFUSED)
def test_refusal(name: str, prompt: int, max_tokens: int, message: str) -> None:
    scheduler = make_scheduler(make_request("used", 3), num_pages=4, max_model_len=24)
    with pytest.raises(InvalidRequestError) as caught:
        scheduler.add(make_request(name, prompt, max_tokens))
    assert (str(caught.value), scheduler.waiting_lengths(), scheduler.pool.num_used) == (message, [3], 0)
    assert step(scheduler) == [("used", 0, 3, True)]


@pytest.mark.parametrize(("prompt", "max_tokens", "max_model_len"), [(16, 1, 24), (1, 16, 24), (8, 9, 24), (8, 99, 17)])
def test_what_just_fits_is_served(prompt: int, max_tokens: int, max_model_len: int) -> None:
    request = make_request("a", prompt, max_tokens)
    scheduler = make_scheduler(request, num_pages=4, max_model_len=max_model_len)
    for _ in range(17):
        step(scheduler)
    assert (request.finish_reason, request.num_tokens, scheduler.pool.num_used) == ("length", 17, 0)


def test_wrong_sizes_are_refused() -> None:
    for name in ("num_pages", "page_size", "max_model_len", "max_num_seqs"):
        with pytest.raises(ConfigError, match=f"^{name} is 0, but must be >= 1$"):
            make_scheduler(**{name: 0})
    with pytest.raises(ConfigError, match=r"^max_num_batched_tokens is 3, but must be >= max_num_seqs 4$"):
        make_scheduler(max_num_batched_tokens=3)


ENDS = [
    (EOS, {"eos": True}, 8, (1, "stop", None)),
    (EOS, {}, 8, (8, "length", None)),
    (STOP, {"stop": True}, 8, (1, "stop", STOP)),
    (STOP, {"stop": True}, 1, (1, "stop", STOP)),
    (9, {"eos": True, "stop": True}, 1, (1, "length", None)),
    (9, {}, 99, (14, "length", None)),
]


@pytest.mark.parametrize(("token", "flags", "max_tokens", "end"), ENDS)
def test_finish_reasons(token: int, flags: dict[str, bool], max_tokens: int, end: tuple[int, str, int | None]) -> None:
    request = make_request("a", 2, max_tokens, **flags)
    scheduler = make_scheduler(request, max_model_len=16)
    for _ in range(end[0]):
        assert request.status is not RequestStatus.FINISHED
        step(scheduler, token)
    assert (len(request.output_token_ids), request.finish_reason, request.stop_reason) == end
    assert (request.status, scheduler.has_work, scheduler.pool.num_used, step(scheduler)) == (RequestStatus.FINISHED, False, 0, [])
    scheduler.add(request)  # the id is free again


def test_commit_returns_who_got_a_token_and_when() -> None:
    a, b = make_request("a", 4, 1), make_request("b", 4)
    scheduler = make_scheduler(a, b, max_num_batched_tokens=6)
    for now, changed in ((1.0, [a]), (2.0, [b]), (3.0, [b])):
        plan = scheduler.schedule(now - 0.5)
        assert plan is not None and scheduler.commit(plan, [9] * len(plan.sampled), now) == changed
    assert [(r.metrics.first_scheduled_time, r.metrics.first_token_time) for r in (a, b)] == [(0.5, 1.0), (0.5, 2.0)]


def test_abort() -> None:
    running, flying, waiting = (make_request(name, 5) for name in ("running", "flying", "waiting"))
    scheduler = make_scheduler(running, flying, waiting, max_num_seqs=2)
    step(scheduler)
    assert [scheduler.abort(name) for name in ("running", "waiting", "running", "nobody")] == [True, True, False, False]
    scheduler.check()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.pool.num_used) == (1, 0, 2)
    plan = scheduler.schedule()
    assert plan is not None and rows_of(plan) == [("flying", 5, 1, True)]
    assert scheduler.abort("flying")
    assert scheduler.commit(plan, [9], 2.0) == [], "aborted while its step was computed"
    assert [r.output_token_ids for r in (running, flying, waiting)] == [[9], [9], []]
    assert {(r.finish_reason, r.stop_reason, r.status) for r in (running, flying, waiting)} == {("abort", None, RequestStatus.FINISHED)}
    assert not scheduler.has_work and scheduler.pool.num_used == 0


def next_token(tokens: bytes) -> int:
    """The fake model: every token before it decides the next one."""
    return zlib.crc32(tokens) % VOCAB


def generate_alone(request: Request, max_model_len: int) -> tuple[list[int], str, int | None]:
    """Output, finish reason and stop reason of a request that has the device for itself."""
    output: list[int] = []
    while True:
        output.append(next_token(bytes(request.prompt_token_ids + output)))
        if output[-1] in request.eos_token_ids | request.stop_token_ids:
            return output, "stop", STOP if output[-1] == STOP else None
        if len(output) == request.max_tokens or len(request.prompt_token_ids) + len(output) == max_model_len:
            return output, "length", None


class FakeDevice:
    """Pages as the real step has them, with (request, position, token) in place of a key."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.pages = np.full((num_pages, page_size, 3), -1)

    def slots(self, block_table: np.ndarray, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        page, offset = np.divmod(np.arange(start, end), self.pages.shape[1])
        return block_table[page], offset

    def forget(self, running: list[Request], plan: StepPlan, block_tables: np.ndarray) -> None:
        """Spoils all but what running requests had computed before the plan: what is preempted must be computed again."""
        starts = dict(zip(plan.requests, plan.starts.tolist(), strict=True))
        keep = np.zeros(self.pages.shape[:2], bool)
        for request in running:
            keep[self.slots(block_tables[request.row], 0, starts.get(request, request.num_computed))] = True
        self.pages[~keep] = -1

    def run(self, plan: StepPlan, tokens: np.ndarray, block_tables: np.ndarray) -> list[int]:
        """Writes every row, then reads every row back; the tokens that are sampled."""
        ends = plan.starts + plan.counts
        for request, row, start, end in zip(plan.requests, plan.rows, plan.starts, ends, strict=True):
            written = [(int(request.request_id), i, tokens[row, i]) for i in range(start, end)]
            self.pages[self.slots(block_tables[row], start, end)] = written
        sampled = []
        for request, row, end in zip(plan.requests, plan.rows, ends, strict=True):
            read = self.pages[self.slots(block_tables[row], 0, end)]
            own = (request.prompt_token_ids + request.output_token_ids)[:end]
            assert read.tolist() == [[int(request.request_id), i, token] for i, token in enumerate(own)]
            if request in plan.sampled:
                sampled.append(next_token(bytes(read[:, 2].tolist())))
        return sampled


class SchedulerMachine(RuleBasedStateMachine):
    """The model: the unfinished requests in the order of arrival, and what each would generate alone."""

    @initialize(sizes=st.tuples(st.integers(1, 30), st.integers(1, 3), st.integers(2, 24), st.integers(1, 5), st.integers(0, 16)))
    def start(self, sizes: tuple[int, ...]) -> None:
        self.num_pages, self.page_size, self.length, self.rows, more = sizes
        self.budget, self.short = self.rows + more, more // 4
        self.scheduler = make_scheduler(**dict(zip(SIZES, (*sizes[:4], self.budget), strict=True)))
        self.device = FakeDevice(self.num_pages, self.page_size)
        self.unfinished: list[Request] = []
        self.num_requests = 0

    def running(self) -> list[Request]:
        return [request for request in self.unfinished if request.status is RequestStatus.RUNNING]

    @rule(prompt=st.lists(st.integers(2, VOCAB - 1), max_size=20), max_tokens=st.integers(1, 20), eos=st.booleans(), stop=st.booleans())
    def add(self, prompt: list[int], max_tokens: int, eos: bool, stop: bool) -> None:
        self.num_requests += 1
        request = make_request(str(self.num_requests), prompt, max_tokens, eos=eos, stop=stop)
        computed = min(len(prompt) + max_tokens, self.length) - 1
        if 0 < len(prompt) < self.length and computed <= self.num_pages * self.page_size:
            self.scheduler.add(request)
            self.unfinished.append(request)
        else:
            with pytest.raises(InvalidRequestError):
                self.scheduler.add(request)

    @precondition(lambda self: self.unfinished)
    @rule(index=st.integers(0, 9))
    def abort(self, index: int) -> None:
        request = self.unfinished.pop(index % len(self.unfinished))
        assert self.scheduler.abort(request.request_id) and not self.scheduler.abort(request.request_id)
        assert (request.finish_reason, request.status, request.row) == ("abort", RequestStatus.FINISHED, -1)

    @rule(count=st.integers(1, 6), abort=st.none() | st.integers(0, 9))
    def steps(self, count: int, abort: int | None) -> None:
        for number in range(count):
            self.step(abort if number == 0 else None)

    def step(self, abort: int | None = None) -> None:
        """One step; `abort` ends a request while it is computed."""
        preemptions = sum(request.metrics.num_preemptions for request in self.unfinished)
        plan = self.scheduler.schedule()
        self.consistent()
        if plan is None:
            assert not self.unfinished
            return
        self.check_plan(plan, preempted=preemptions < sum(request.metrics.num_preemptions for request in self.unfinished))
        block_tables = self.scheduler.block_tables.ids[0]
        self.device.forget(self.running(), plan, block_tables)
        sampled = self.device.run(plan, self.scheduler.table.tokens, block_tables)
        if abort is not None:
            self.abort(abort)
        got = [request for request in plan.sampled if request in self.unfinished]
        assert self.scheduler.commit(plan, sampled, 1.0) == got
        for request in got:
            output, *end = generate_alone(request, self.length)
            assert request.output_token_ids == output[: len(request.output_token_ids)], "as if it had the device for itself"
            done = len(request.output_token_ids) == len(output)
            assert [request.finish_reason, request.stop_reason] == (end if done else [None, None])
            if done:
                self.unfinished.remove(request)
        self.consistent()

    def check_plan(self, plan: StepPlan, *, preempted: bool) -> None:
        assert len(rows_of(plan)) <= self.rows and plan.num_tokens <= self.budget
        assert self.unfinished[0] in plan.requests, "the oldest advances in every step: nobody starves"
        assert (plan.starts + plan.counts).tolist() == [request.num_computed for request in plan.requests]
        behind = [request.num_tokens - start for request, start in zip(plan.requests, plan.starts.tolist(), strict=True)]
        assert (plan.counts >= 1).all() and (plan.counts <= behind).all()
        assert plan.sampled == [request for request, count, most in zip(plan.requests, plan.counts, behind) if count == most]
        order = [(request, count) for request, count in zip(plan.requests, plan.counts, strict=True) if not 1 < count <= self.short]
        places = [(count > 1, int(request.request_id)) for request, count in order if count > 1 or request.num_computed > 1]
        assert places == sorted(places), "but for what is short"
        if plan.num_tokens < self.budget and not preempted:
            assert len(plan.requests) == len(self.running()) and plan.sampled == plan.requests, "budget is left over, but rows are behind"

    @invariant()
    def consistent(self) -> None:
        self.scheduler.check()
        running = self.running()
        assert all(request.status in (RequestStatus.RUNNING, RequestStatus.WAITING) for request in self.unfinished)
        for index, request in enumerate(running):
            passed = request is not self.unfinished[index]
            assert not passed or len(request.prompt_token_ids) <= self.short, "first come, first served, but for what is short"
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (len(running), len(self.unfinished) - len(running))
        assert self.scheduler.has_work == bool(self.unfinished) and len(running) <= self.rows
        most = sum(-(-request.num_tokens // self.page_size) for request in running)
        assert self.scheduler.pool.num_used <= most, "pages beyond a request's tokens, or pages that nobody frees"

    def teardown(self) -> None:
        """The oldest advances by a token in every step and is never preempted: so many steps end everything."""
        left = getattr(self, "unfinished", [])
        for _ in range(sum(min(len(request.prompt_token_ids) + request.max_tokens, self.length) - 1 for request in left)):
            self.step()
        assert not left


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=examples(60), stateful_step_count=40, deadline=None)
