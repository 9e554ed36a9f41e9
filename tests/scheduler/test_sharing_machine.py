"""Random requests, samples, beams, aborts, preemptions, evictions and failing steps on a fake device that remembers contents.

A slot of the fake device holds a number that stands for its token, all tokens before it and the group of layers, as keys and values
do. A page that is lost, freed too early, shared too long, not copied, or found under a wrong key shows as a wrong number at the next
read. Groups with a window read what the window reaches, and the device knows of block tables what plans have told it.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from pjax.kv_cache.layout import NULL_PAGE, KVCacheGroup, KVCacheLayout
from pjax.outputs import RequestMetrics
from pjax.params import BeamSearchParams, SamplingParams
from pjax.scheduler import Request, RequestStatus, Scheduler, StepPlan
from pjax.scheduler.beam_search import BeamSearch, Candidates
from pjax.scheduler.sequence_table import UNKNOWN
from tests.budget import examples

VOCAB, EOS, POISON = 16, 0, -1


def chain(salt: str | None, tokens: list[int]) -> list[int]:
    """What the slots of these tokens hold."""
    held = [hash((11, len(salt or "")))]  # of numbers only: hashes of strings differ from process to process
    for token in tokens:
        held.append(hash((held[-1], token)))
    return held[1:]


def next_token(held: int, index: int) -> int:
    """The fake model's draw of sample `index` after a slot that holds `held`."""
    return hash((held, index, 3)) % VOCAB


def candidates_after(held: int) -> Candidates:
    """The fake model's log-probabilities, the likeliest first."""
    logprobs = -np.array([hash((held, token)) % 9973 + 1 for token in range(VOCAB)], np.float32) / 1000
    order = np.argsort(-logprobs, kind="stable").astype(np.int32)
    return order, logprobs[order]


def sample_alone(request: Request, max_model_len: int) -> list[int]:
    """What a sample generates with the device for itself."""
    output: list[int] = []
    while True:
        output.append(next_token(chain(request.cache_salt, request.prompt_token_ids + output)[-1], request.index))
        if output[-1] == EOS or len(output) == request.max_tokens or len(request.prompt_token_ids) + len(output) == max_model_len:
            return output


def search_alone(request: Request) -> list[tuple[float, list[int]]]:
    """What a beam search finds, its beams kept as lists."""
    assert request.beam is not None
    search = BeamSearch(request.beam.params, request.beam.max_tokens, request.beam.eos_token_ids)
    outputs: list[list[int]] = [[]]
    while not search.done:
        held = [chain(request.cache_salt, request.prompt_token_ids + output)[-1] for output in outputs]
        chosen = search.choose(outputs, [candidates_after(value) for value in held])
        outputs = [[*outputs[beam], token] for beam, token in chosen]
    return [(found.score, found.tokens) for found in search.finished]


LAYOUTS: dict[str, KVCacheLayout] = {
    "full": KVCacheLayout.uniform(2),
    "window": KVCacheLayout((KVCacheGroup((0,), 5),), 1, 1),
    "mixed": KVCacheLayout((KVCacheGroup((0,)), KVCacheGroup((1,), 6), KVCacheGroup((2,), 1)), 1, 1),
}


def in_group(held: list[int], group: int) -> list[int]:
    """What the slots hold in the layers of a group."""
    return [hash((value, group)) for value in held]


class FakeDevice:
    """Pages, block tables and sampled tokens as the real step has them. A step copies, then all rows write, then all rows read."""

    def __init__(self, scheduler: Scheduler, num_pages: int, page_size: int) -> None:
        self.scheduler = scheduler
        self.tables = np.full(scheduler.block_tables.ids.shape, num_pages)
        self.pages = np.full((num_pages, page_size), POISON)
        self.tokens = np.full(scheduler.table.tokens.shape, POISON)
        self.host = np.full((100, page_size), POISON)

    def forget(self) -> None:
        """Spoils the pages that nobody owns or may find."""
        pool = self.scheduler.pool
        leaving = {page_id for page_id, _ in self.scheduler.kv.swap._outs}  # read by the next plan, before it writes
        for page_id in range(pool.num_pages):
            if pool.num_owners(page_id) == 0 and pool._keys[page_id] is None and page_id not in leaving:
                self.pages[page_id] = POISON

    def swap(self, outs: list[Any], ins: list[Any]) -> None:
        """Copies to the host and back; slots that nobody owns or may find are spoiled."""
        for page_id, slot in outs:
            self.host[slot] = self.pages[page_id]
        for slot, page_id in ins:
            self.pages[page_id] = self.host[slot]
        slots = self.scheduler.kv.swap.pool
        for slot in range(slots.num_pages if slots else 0):
            if slots and slots.num_owners(slot) == 0 and slots._keys[slot] is None:
                self.host[slot] = POISON

    def run(self, plan: StepPlan) -> list[int]:
        """What the last slot of each of `plan.sampled` holds."""
        pool, layout = self.scheduler.pool, self.scheduler.kv.layout
        self.tables.reshape(-1)[plan.blocks[:, 0]] = plan.blocks[:, 1]
        self.swap(plan.swap_outs.tolist(), plan.swap_ins.tolist())
        for source, target in plan.copies.tolist():
            assert pool.num_owners(target) == 1
            self.pages[target] = self.pages[source]
        written: Counter[tuple[int, int]] = Counter()
        forks: Counter[int] = Counter(plan.sample_sources.tolist())  # of a row, the newly forked sequences included
        owners: dict[int, int] = {}
        ends = (plan.starts + plan.counts).tolist()
        for place, (request, row, start, end) in enumerate(zip(plan.requests, plan.rows, plan.starts.tolist(), ends, strict=True)):
            chained = chain(request.cache_salt, self.known(row, end))
            for group, tables in enumerate(self.tables):
                held = in_group(chained, group)
                for position in range(start, end):
                    index, offset = divmod(position, self.pages.shape[1])
                    self.pages[tables[row, index], offset] = held[position]
                    written[int(tables[row, index]), offset] += 1
                    owners[int(tables[row, index])] = max(1, forks[place])
        assert not written or max(written.values()) == 1, "two rows write one slot"
        for (page_id, _), _ in written.items():
            key = pool._keys[page_id]
            assert pool.num_owners(page_id) <= owners[page_id] or key is not None, "a page is written that others own"
        for request, row, start, end in zip(plan.requests, plan.rows, plan.starts.tolist(), ends, strict=True):
            own, known = request.prompt_token_ids + request.output_token_ids, self.known(row, end)
            assert known[: len(own)] == own[:end] and len(known) <= len(own) + 1, "at most one token is not on the host yet"
            for number, group in enumerate(layout.groups):
                first = group.first_needed(start)
                page, offset = np.divmod(np.arange(first, end), self.pages.shape[1])
                held = in_group(chain(request.cache_salt, known), number)
                assert self.pages[self.tables[number, row][page], offset].tolist() == held[first:]
        last = [ends[source] - 1 for source in plan.sample_sources]
        rows = [int(plan.rows[source]) for source in plan.sample_sources]
        requests = [plan.requests[source] for source in plan.sample_sources]
        held = [
            chain(request.cache_salt, self.known(row, i + 1))[-1] for request, row, i in zip(requests, rows, last, strict=True)
        ]  # which every group's pages were just seen to hold
        for request, value, position in zip(plan.sampled, held, last, strict=True):
            self.tokens[request.row, position + 1] = next_token(value, request.index)
        return held

    def known(self, row: int, end: int) -> list[int]:
        """The first tokens of a row, from the device where the host does not know them."""
        host = self.scheduler.table.tokens[row, :end]
        return np.where(host == UNKNOWN, self.tokens[row, :end], host).tolist()


class SharingMachine(RuleBasedStateMachine):
    """The model: unfinished requests as groups of sequences."""

    layout: ClassVar[KVCacheLayout] = LAYOUTS["full"]
    num_operations: ClassVar[int] = 0
    seen: ClassVar[Counter[str]] = Counter()

    @initialize(
        sizes=st.tuples(st.integers(2, 14), st.integers(1, 4), st.integers(4, 32), st.integers(1, 5), st.integers(0, 9)),
        caching=st.booleans() | st.just(True),
        swap=st.sampled_from([("auto", 0), ("recompute", 8), ("swap", 3), ("swap", 30), ("swap", 100), ("auto", 30)]),
        ahead=st.sampled_from([0, 1, 1]),
    )
    def start(self, sizes: tuple[int, ...], caching: bool, swap: tuple[str, int], ahead: int) -> None:
        num_pages, self.page_size, self.length, self.rows, more = sizes
        self.num_pages = num_pages * len(self.layout.groups) + self.layout.num_reserved
        self.scheduler = Scheduler(
            layout=self.layout,
            num_pages=self.num_pages,
            page_size=self.page_size,
            max_model_len=self.length,
            max_num_seqs=self.rows,
            max_num_batched_tokens=self.rows + more,
            enable_prefix_caching=caching,
            seconds_per_priority=2.0,
            preemption_mode=swap[0],
            num_host_slots=swap[1],
        )
        self.scheduler.kv.swap.cost.observe_step(1, 1, 1.0)
        self.scheduler.kv.swap.cost.observe_copy(1, 1.5)
        self.now = 0.0
        self.device = FakeDevice(self.scheduler, self.num_pages, self.page_size)
        self.ahead = ahead
        self.in_flight: deque[tuple[StepPlan, list[int]]] = deque()
        self.groups: list[list[Request]] = []
        self.searches: list[Request] = []
        self.num_requests = 0

    def count(self, name: str) -> None:
        SharingMachine.num_operations += 1
        SharingMachine.seen[name] += 1

    def sequences(self, status: RequestStatus) -> list[Request]:
        return [request for group in self.groups for request in group if request.status is status]

    @rule(
        base=st.integers(0, 2),
        keep=st.integers(0, 9),
        more=st.lists(st.integers(1, VOCAB - 1), max_size=4),
        max_tokens=st.integers(1, 24),
        n=st.sampled_from([1, 1, 2, 3, 6]),
        width=st.sampled_from([0, 0, 2, 3]),
        salt=st.sampled_from([None, None, "a"]),
        priority=st.integers(-2, 2),
        timeout=st.none() | st.none() | st.integers(1, 30),
    )
    def add(
        self,
        base: int,
        keep: int,
        more: list[int],
        max_tokens: int,
        n: int,
        width: int,
        salt: str | None,
        priority: int,
        timeout: int | None,
    ) -> None:
        kv = self.scheduler.kv
        most = max(tokens for tokens in range(1, self.length) if kv.num_pages_for(tokens) <= self.scheduler.pool.num_usable)
        prompt = ([1 + (base * 3 + i * (base + 1)) % (VOCAB - 1) for i in range(keep)] + [*more, 1])[:most]
        max_tokens = min(max_tokens, most + 1 - len(prompt))
        width = min(width, self.rows)
        eos = frozenset([EOS])
        search = BeamSearch(BeamSearchParams(beam_width=width, max_tokens=max_tokens), max_tokens, eos) if width else None
        self.num_requests += 1
        common: dict[str, Any] = {
            "request_id": str(self.num_requests),
            "prompt_token_ids": prompt,
            "params": SamplingParams(),
            "max_tokens": max_tokens,
            "stop_token_ids": frozenset(),
            "eos_token_ids": eos,
            "seed": 0,
            "metrics": RequestMetrics(arrival_time=self.now),
            "priority": priority,
            "deadline": None if timeout is None else self.now + timeout,
            "cache_salt": salt,
            "beam": search,
        }
        group = [Request(**common, index=index) for index in range(width or n)]
        self.scheduler.add(*group)
        self.groups.append(group)
        self.count("beam search" if width else "samples" if n > 1 else "add")

    @precondition(lambda self: self.groups)
    @rule(index=st.integers(0, 9))
    def abort(self, index: int) -> None:
        group = self.groups.pop(index % len(self.groups))
        assert self.scheduler.abort(group[0].request_id)
        assert all(request.status is RequestStatus.FINISHED and request.row == -1 for request in group)
        self.count("abort")

    def stop_one_sample(self, index: int) -> None:
        """As a stop string does: after it has a token, so never one that others follow."""
        running = [r for r in self.sequences(RequestStatus.RUNNING) if r.beam is None and r.output_token_ids]
        if running:
            self.scheduler.finish(running[index % len(running)], "stop", "text")
            self.tidy()
            self.count("stop")

    @precondition(lambda self: self.sequences(RequestStatus.RUNNING))
    @rule(index=st.integers(0, 9))
    def preempt(self, index: int) -> None:
        running = self.sequences(RequestStatus.RUNNING)
        before = self.scheduler.kv.swap.num_saved_pages
        self.scheduler.preempt(running[index % len(running)])
        SharingMachine.seen["saved"] += self.scheduler.kv.swap.num_saved_pages - before
        self.device.swap(*self.scheduler.kv.swap.take())
        self.count("preempt")

    @precondition(lambda self: self.groups)
    @rule(seconds=st.integers(1, 5))
    def time_passes(self, seconds: int) -> None:
        """Deadlines come."""
        self.now += seconds
        expired = self.scheduler.expire(self.now)
        for group in list(self.groups):
            if group[0].request_id in expired:
                assert all(request.status is RequestStatus.FINISHED and request.row == -1 for request in group)
                assert {r.finish_reason for r in group} <= {"timeout", "stop", "length"}
                self.groups.remove(group)
                self.count("timeout")
        assert all(group[0].deadline is None or group[0].deadline > self.now for group in self.groups)

    @precondition(lambda self: self.groups)
    @rule(share=st.floats(0, 1))
    def evict(self, share: float) -> None:
        """Somebody else takes free pages, kept ones too, writes them and gives them back."""
        pool = self.scheduler.pool
        self.device.swap(*self.scheduler.kv.swap.take())
        taken = pool.allocate(int(share * pool.num_free))
        self.device.pages[taken] = POISON
        pool.free(taken)
        self.count("evict")

    @precondition(lambda self: self.groups)
    @rule(really=st.sampled_from([False, False, True]))
    def failing_step(self, really: bool) -> None:
        """Planned, but never computed; the device has lost everything."""
        if not really:
            return
        self.scheduler.schedule()
        self.scheduler.preempt_all()
        self.in_flight.clear()
        self.device.pages[:] = POISON
        self.count("failure")

    @precondition(lambda self: self.groups)
    @rule(
        count=st.integers(1, 3),
        abort=st.sampled_from([None, None, None, 0, 3]),
        stop=st.sampled_from([None, None, None, 0, 3]),
    )
    def steps(self, count: int, abort: int | None, stop: int | None) -> None:
        for number in range(count):
            self.step(abort if number == 0 else None)
        if stop is not None:
            self.stop_one_sample(stop)

    def step(self, abort: int | None = None) -> None:
        """Plans and runs until enough is under way, then commits the oldest step; `abort` ends a request in between."""
        while len(self.in_flight) <= self.ahead and self.plan():
            pass
        self.count("step")
        if not self.in_flight:
            assert not self.groups, "somebody waits, but nothing is computed"
            return
        if abort is not None and self.groups:
            self.abort(abort)
        plan, held = self.in_flight.popleft()
        SharingMachine.seen["ahead"] += len(self.in_flight)
        tokens = [next_token(value, request.index) for value, request in zip(held, plan.sampled, strict=True)]
        top = [candidates_after(value) for value in held]
        stacked = (np.array([t for t, _ in top], np.int32), np.array([p for _, p in top], np.float32))
        for request in self.scheduler.commit(plan, tokens, 1.0, stacked):
            if request.beam is not None:
                assert [(f.score, f.tokens) for f in request.beam.finished] == search_alone(request)
                SharingMachine.seen["search done"] += 1
                continue
            expected = sample_alone(request, self.length)
            assert request.output_token_ids == expected[: len(request.output_token_ids)], "as if it had the device for itself"
            assert (request.finish_reason is not None) == (len(request.output_token_ids) == len(expected))
        SharingMachine.seen["cached"] += sum(request.num_cached_tokens or 0 for group in self.groups for request in group[:1])
        self.tidy()
        self.consistent()

    def plan(self) -> bool:
        self.device.forget()
        swap = self.scheduler.kv.swap
        saved, restored = swap.num_saved_pages, swap.num_restored_pages
        plan = self.scheduler.schedule(self.now)
        SharingMachine.seen["saved"] += swap.num_saved_pages - saved
        SharingMachine.seen["restored"] += swap.num_restored_pages - restored
        self.consistent()
        if plan is None:
            return False
        assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
        assert max(len(plan.requests), len(plan.sampled)) <= self.rows
        assert len(plan.copies) <= len(plan.requests) * len(self.layout.groups)
        SharingMachine.seen["copy"] += len(plan.copies)
        if self.layout.has_windows:
            SharingMachine.seen["passed"] += int((plan.blocks[:, 1] == NULL_PAGE).sum())
        self.in_flight.append((plan, self.device.run(plan)))
        return True

    def tidy(self) -> None:
        self.groups = [group for group in self.groups if any(r.status is not RequestStatus.FINISHED for r in group)]

    @invariant()
    def consistent(self) -> None:
        self.scheduler.check()
        running = self.sequences(RequestStatus.RUNNING)
        assert len(running) == self.scheduler.num_running <= self.rows
        assert self.scheduler.has_work == bool(self.groups)
        most = sum(self.scheduler.kv.num_pages_for(request.num_planned) for request in running)
        assert self.scheduler.pool.num_used <= most, "pages beyond what tokens need, or pages that nobody frees"

    def teardown(self) -> None:
        """Whatever is left ends by itself, and leaves nothing."""
        if not hasattr(self, "scheduler"):
            return
        left = 3000
        while self.groups:
            self.step()
            left -= 1
            assert left, "no end"
        slots = self.scheduler.kv.swap.pool
        assert slots is None or slots.num_used == 0
        assert self.scheduler.pool.num_used == 0 and self.scheduler.table.num_free_rows == self.rows


BUDGET = settings(
    max_examples=examples(80),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
ALL_SEEN = (
    "add, samples, beam search, search done, abort, stop, preempt, evict, failure, copy, cached, timeout, saved, restored, ahead"
).split(", ")


def machine_of(layout: str) -> type[SharingMachine]:
    return type(f"SharingMachine_{layout}", (SharingMachine,), {"layout": LAYOUTS[layout]})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharing_as_it_comes(layout: str) -> None:
    run_state_machine_as_test(machine_of(layout), settings=BUDGET)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharing(layout: str) -> None:
    """The same examples in every run, which must have done enough, of every kind: one that avoids what is difficult proves nothing."""
    SharingMachine.num_operations, SharingMachine.seen = 0, Counter()
    run_state_machine_as_test(machine_of(layout), settings=settings(BUDGET, max_examples=200, derandomize=True))
    assert SharingMachine.num_operations >= 4000, SharingMachine.seen
    for name in [*ALL_SEEN, *["passed"] * LAYOUTS[layout].has_windows]:
        assert SharingMachine.seen[name] >= 4, (name, SharingMachine.seen)
