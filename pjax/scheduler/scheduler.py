"""Continuous batching. There is no prefill phase and no decode phase.

Each sequence has `num_computed` tokens in the pages and catches up with its `num_tokens`; every step gives it
`min(budget, num_tokens - num_computed)`. That one rule carries chunked prefill, decode, and recomputation after a
preemption. Order within a step: rows that need one token, then the rest of the running ones, then waiting ones, each
first come, first served. A waiting one begins behind the full pages that are cached, also those that an older row computes
in this very step. When pages run out the youngest running request is preempted. The oldest one is never
preempted for another, and fits the pool alone, so everything that is admitted ends.

Of several sequences of one prompt the first computes it; the others follow, and already have rows. When the prompt is
computed each of them gets a token of its own and all pages, and from then on is a sequence like any other.

Beams are such sequences too. One that has caught up keeps its candidates and waits, with its pages or without, until
all beams of its search have; then the search chooses, pages are forked and freed, and each beam has a token to compute.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Sequence

import numpy as np

from pjax.errors import ConfigError, InvalidRequestError
from pjax.scheduler.beam import BeamSearch, Candidates
from pjax.scheduler.kv_manager import KVManager
from pjax.scheduler.page_pool import PagePool
from pjax.scheduler.plan import StepPlan
from pjax.scheduler.request import Request, RequestStatus
from pjax.scheduler.table import SequenceTable


class Scheduler:
    """Decides every step's rows and owns the page pool's bookkeeping."""

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        for name, value in (
            ("num_pages", num_pages),
            ("page_size", page_size),
            ("max_model_len", max_model_len),
            ("max_num_seqs", max_num_seqs),
        ):
            if value < 1:
                raise ConfigError(f"{name} is {value}, but must be >= 1")
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(f"max_num_batched_tokens is {max_num_batched_tokens}, but must be >= max_num_seqs {max_num_seqs}")
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.pool = PagePool(num_pages)
        self.table = SequenceTable(max_num_seqs, max_model_len, page_size)
        self.kv = KVManager(self.pool, self.table, page_size, enable_prefix_caching=enable_prefix_caching)
        self._waiting: deque[Request] = deque()  # in the order of arrival
        self._running: list[Request] = []  # in the order of arrival
        self._requests: dict[str, list[Request]] = {}  # unfinished; sequences of one prompt share an id
        self._num_added = 0
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row or for pages."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    # ---- requests

    def waiting_lengths(self) -> list[int]:
        """Tokens of each waiting request."""
        return [request.num_tokens for request in self._waiting]

    @property
    def num_waiting_sequences(self) -> int:
        """Sequences of the requests that wait."""
        return sum(1 + len(request.followers) for request in self._waiting)

    def add(self, request: Request, *others: Request) -> None:
        """Queues a request, and others that continue the same prompt under the same id.

        Raises InvalidRequestError when it can never fit; then nothing has changed.
        """
        self._check_fits(request)
        sequences = [request, *others]
        self._requests[request.request_id] = list(sequences)
        for sequence in sequences:
            sequence.order = self._num_added
            self._num_added += 1
        size = len(self.table.tokens)  # more than there are rows: the next ones are led by one of their own
        for first in range(0, len(sequences), size):
            leader = sequences[first]
            leader.followers = sequences[first + 1 : first + size]
            for follower in leader.followers:
                follower.status = RequestStatus.FOLLOWING
            self._waiting.append(leader)

    def _check_fits(self, request: Request) -> None:
        num_prompt, where = len(request.prompt_token_ids), f"(request {request.request_id!r})"
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request_id {request.request_id!r} is in use by an unfinished request")
        if num_prompt == 0:
            raise InvalidRequestError(f"prompt is empty, but must have at least 1 token {where}")
        if num_prompt + 1 > self.max_model_len:
            raise InvalidRequestError(
                f"prompt has {num_prompt} tokens, but max_model_len is {self.max_model_len} and must leave room for one more {where}"
            )
        # The last token is sampled, never computed: it needs no slot.
        most = min(num_prompt + request.max_tokens, self.max_model_len) - 1
        needed = self.kv.num_pages_for(most)
        if needed > self.pool.num_pages:
            raise InvalidRequestError(
                f"prompt and max_tokens need {needed} pages ({num_prompt} + {request.max_tokens} tokens), "
                f"but the page pool has {self.pool.num_pages} {where}"
            )

    def abort(self, request_id: str) -> bool:
        """Ends all sequences of a request with reason "abort" and frees all they have; False when there is none of that id."""
        sequences = list(self._requests.get(request_id, ()))
        for sequence in reversed(sequences):  # followers before those whom they follow
            self.finish(sequence, "abort")
        return bool(sequences)

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """Ends an unfinished sequence and frees all it has."""
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
            self._release(request)
        elif request.status is RequestStatus.WAITING:
            self._waiting.remove(request)
        else:
            for leader in self._requests[request.request_id]:
                if request in leader.followers:
                    leader.followers.remove(request)
            self._free_row(request)
        request.status, request.finish_reason, request.stop_reason = RequestStatus.FINISHED, reason, stop_reason
        unfinished = self._requests[request.request_id]
        unfinished.remove(request)
        if not unfinished:
            del self._requests[request.request_id]

    def _release(self, request: Request) -> None:
        self.kv.release(request)
        for sequence in (request, *request.followers):
            self._free_row(sequence)

    def _free_row(self, request: Request) -> None:
        if request.row >= 0:
            self.table.free_row(request.row)
            request.row = -1

    # ---- a step

    def schedule(self, now: float | None = None) -> StepPlan | None:
        """The next step, or None when there is nothing to do. Pages for all its tokens are allocated."""
        budget = self.max_num_batched_tokens
        given: dict[Request, int] = {}
        behind = [(request, request.num_tokens - request.num_computed) for request in self._running]
        decode = [item for item in behind if item[1] == 1]
        prefill = [item for item in behind if item[1] > 1]
        preempted = False
        for request, count in decode + prefill:
            if budget == 0:
                break
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted for an older one in this very step
            count = min(budget, count)
            while not self.kv.extend(request, request.num_computed + count):
                victim = self._running[-1]
                budget += given.pop(victim, 0)
                self._preempt(victim)
                preempted = True
                if victim is request:
                    break
            else:
                given[request] = count
                budget -= count
        for request, count in given.items():
            self.kv.remember(request, request.num_computed + count)
        now = time.monotonic() if now is None else now
        if not preempted:
            self._admit(given, budget, now)
        while not given and self._waiting:  # all that run are beams that wait for one of those that don't
            self._preempt(self._running[-1])
            self._admit(given, budget, now)
        return StepPlan.make(given, self.kv.take_copies()) if given else None

    def _admit(self, given: dict[Request, int], budget: int, now: float) -> None:
        while self._waiting and budget > 0 and self.table.num_free_rows > len(self._waiting[0].followers):
            request = self._waiting[0]
            # Room for all its tokens and one more, not only for the first chunk: else it would soon be preempted. Where budget
            # is left every running row has its pages already.
            most = min(request.num_tokens + 1, self.max_model_len)
            cached = self.kv.find_cached(request)
            if not self.kv.can_start(cached, most, more=len(request.followers)) and self._running:
                break
            self._waiting.popleft()
            self._start(request, cached, now)
            count = min(budget, request.num_tokens - request.num_computed)
            self.kv.extend(request, request.num_computed + count)
            self.kv.remember(request, request.num_computed + count)
            given[request] = count
            budget -= count

    def _start(self, request: Request, cached: list[int], now: float) -> None:
        for sequence in (request, *request.followers):
            sequence.row = self.table.allocate_row()
        request.status = RequestStatus.RUNNING
        self._insert_running(request)
        if request.metrics.first_scheduled_time is None:
            request.metrics.first_scheduled_time = now
        num_prompt = len(request.prompt_token_ids)
        self.table.tokens[request.row, :num_prompt] = request.prompt_token_ids
        self.table.tokens[request.row, num_prompt : request.num_tokens] = request.output_token_ids
        self.kv.start(request, cached)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed

    def _insert_running(self, request: Request) -> None:
        insort(self._running, request, key=lambda other: other.order)

    def _preempt(self, request: Request) -> None:
        """Frees a running request's pages; all its tokens will be computed again (Kwon et al. 2023, section 4.5).

        A beam that has its candidates needs no pages until it is continued.
        """
        self._running.remove(request)
        self._release(request)
        request.status, request.num_computed = RequestStatus.FOLLOWING, 0
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        if request.candidates is None:
            self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        """Back among the waiting ones, who are mostly younger."""
        request.status = RequestStatus.WAITING
        place = next((i for i, other in enumerate(self._waiting) if other.order > request.order), len(self._waiting))
        self._waiting.insert(place, request)

    def preempt_all(self) -> None:
        """Every running request waits and will be computed again: the step failed, and the device may have lost its pages."""
        for request in reversed(list(self._running)):
            self._preempt(request)
        self.pool.forget()

    def commit(self, plan: StepPlan, sampled: Sequence[int] | np.ndarray, now: float, top: Candidates | None = None) -> list[Request]:
        """Takes a step's result: advances every row, appends the sampled tokens, ends what is done.

        Args:
          sampled: a token for each of `plan.sampled`.
          now: seconds of `time.monotonic()`.
          top: of each of `plan.sampled` the likeliest tokens and their log-probabilities, [m, k] both; read for beams.

        Returns the sequences that got a token, and of a beam search that is done the last to catch up. Those aborted since
        the plan was made are skipped.
        """
        for request, count in zip(plan.requests, plan.counts.tolist(), strict=True):
            if request.status is RequestStatus.RUNNING:
                request.num_computed += count
        changed = []
        for index, (request, token) in enumerate(zip(plan.sampled, np.asarray(sampled).tolist(), strict=True)):
            if request.status is RequestStatus.FINISHED:
                continue
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = now
            if request.beam is not None:
                assert top is not None
                request.candidates = top[0][index], top[1][index]
                self._advance(request.beam, self._requests[request.request_id])
                if request.beam.done:
                    changed.append(request)
                continue
            for follower in request.followers:  # their prompt is computed
                self._fork(request, follower)
            request.followers = []
            self._append(request, token)
            changed.append(request)
            self._stop(request, token)
        return changed

    def _append(self, request: Request, token: int) -> None:
        if request.row >= 0 and request.num_tokens < self.max_model_len:
            self.table.tokens[request.row, request.num_tokens] = token
        request.output_token_ids.append(token)

    def _fork(self, request: Request, other: Request) -> None:
        """Makes another sequence of the same prompt go on from where this one is, on the same pages if both can run."""
        if other.status is RequestStatus.RUNNING:
            self._running.remove(other)
            self.kv.release(other)
            other.status = RequestStatus.FOLLOWING
        other.num_computed, other.num_cached_tokens = 0, request.num_cached_tokens
        other.output_token_ids, other.page_keys = list(request.output_token_ids), list(request.page_keys)
        if request.status is not RequestStatus.RUNNING:
            self._free_row(other)
            return
        if other.row < 0:
            if not self.table.num_free_rows:
                return
            other.row = self.table.allocate_row()
        self.kv.fork(request, other)
        self.table.tokens[other.row, : request.num_tokens] = self.table.tokens[request.row, : request.num_tokens]
        other.status = RequestStatus.RUNNING
        self._insert_running(other)

    def _advance(self, search: BeamSearch, sequences: list[Request]) -> None:
        """Continues the beams of a search if all have their candidates; each parent's first child takes its place."""
        parents = [sequences[index] for index in search.beams]
        candidates = [parent.candidates for parent in parents if parent.candidates is not None]
        if len(candidates) < len(parents):
            return
        chosen = search.choose([parent.output_token_ids for parent in parents], candidates)
        if search.done:
            for sequence in sequences[::-1]:
                self.finish(sequence, "stop" if search.finished[0].ended else "length")
            return
        for parent in parents:
            parent.candidates, parent.followers = None, []
        unused = {parents[beam] for beam, _ in chosen}
        spare = [sequence for sequence in sequences if sequence not in unused]
        children = []
        for beam, _ in chosen:
            child = parents[beam]
            if child in unused:
                unused.remove(child)
            else:
                child = spare.pop()
                self._fork(parents[beam], child)
            children.append(child)
        for child, (_, token) in zip(children, chosen, strict=True):
            self._append(child, token)
            if child.status is RequestStatus.FOLLOWING:
                self._enqueue(child)
        search.beams = [child.index for child in children]

    def _stop(self, request: Request, token: int) -> None:
        if token in request.eos_token_ids:
            self.finish(request, "stop")
        elif token in request.stop_token_ids:
            self.finish(request, "stop", token)
        elif len(request.output_token_ids) >= request.max_tokens or request.num_tokens >= self.max_model_len:
            self.finish(request, "length")

    def check(self) -> None:
        """Proves the invariants; AssertionError with what breaks them."""
        self.kv.check(self._running)
        rows = [sequence.row for request in self._running for sequence in (request, *request.followers)]
        assert len(set(rows)) == len(rows) and len(rows) + self.table.num_free_rows == len(self.table.tokens), f"rows {rows}"
        for queue, status in ((self._waiting, RequestStatus.WAITING), (self._running, RequestStatus.RUNNING)):
            orders = [request.order for request in queue]
            assert orders == sorted(orders), f"{status.value} requests are out of order: {orders}"
            assert all(request.status is status for request in queue)
        for request in self._running:
            behind = request.num_computed < request.num_tokens
            assert behind == (request.candidates is None), f"request {request.request_id!r} has nothing to compute"
        followers = [follower for request in (*self._waiting, *self._running) for follower in request.followers]
        assert all(follower.status is RequestStatus.FOLLOWING for follower in followers)
        unfinished = [sequence for sequences in self._requests.values() for sequence in sequences]
        followers += [sequence for sequence in unfinished if sequence.status is RequestStatus.FOLLOWING and sequence.candidates]
        assert {*self._waiting, *self._running, *followers} == set(unfinished)
        assert len(self._waiting) + len(self._running) + len(followers) == len(unfinished)
