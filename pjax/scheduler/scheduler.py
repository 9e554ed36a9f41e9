"""The life of a sequence, from top to bottom: it waits, starts, is scheduled, preempted or forked, takes tokens, and finishes.

| transition | method | from → to |
|---|---|---|
| wait | `add` | → WAITING; others of its prompt → FOLLOWING |
| start | `_start` | WAITING → RUNNING: a row, and pages of a cached prefix or saved in host memory |
| schedule | `_extend_running`, `_launch` | RUNNING: pages for the tokens of a step, which then count as computed |
| preempt | `preempt` | RUNNING → WAITING, its pages freed or copied to host memory; a beam with candidates → FOLLOWING |
| fork | `_fork` | FOLLOWING → RUNNING on the pages of another; a beam also takes the place of one that ends here |
| take a token | `_take_token` | RUNNING or, if preempted meanwhile, WAITING: one token more |
| take candidates | `_take_candidates`, `_continue_beams` | a beam waits for the others of its search, then each gets a token |
| finish | `finish` | any → FINISHED: row, pages and saved pages are freed |

There is no prefill phase and no decode phase. Each sequence has `num_computed` tokens in the pages and catches up with its
`num_tokens`; every step gives it `min(budget, num_tokens - num_computed)`. That one rule carries chunked prefill, decode, and
recomputation after a preemption. Order within a step: rows that need one token, short prompts where long ones would take it all, the
rest of the running rows, then waiting ones, each the best rank first: by priority, and by arrival within one (`add`). A waiting
one starts behind the full pages that are cached, also those that an earlier row computes in this very step.

When pages run out the running request of the last rank is preempted. That of the first rank is never preempted for another,
and fits the pool alone, so everything that is admitted ends. Each waiting one is admitted when those before it have ended.
Only short prompts pass others, in up to a fourth of a step, and leave the first of those that wait its row and its pages
(docs/decisions/0011-short-prompts.md).

Of several sequences of one prompt the first computes it; the others follow, and already have rows. When the prompt is
computed each of them gets a token of its own and all pages, and from then on is a sequence like any other.

Beams are such sequences too. One that has caught up keeps its candidates and waits, with its pages or without, until
all beams of its search have; then the search chooses, pages are forked and freed, and each beam has a token to compute.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import numpy as np

from pjax.errors import ConfigError, InvalidRequestError
from pjax.kv_cache.block_tables import BlockTables
from pjax.kv_cache.kv_manager import CachedPrefix, KVManager
from pjax.kv_cache.layout import KVCacheLayout
from pjax.kv_cache.page_pool import PagePool
from pjax.kv_cache.swap_space import SwapSpace
from pjax.scheduler.beam_search import BeamSearch, Candidates
from pjax.scheduler.plan import StepPlan
from pjax.scheduler.queues import RemovableHeap, RunningQueue, WaitingQueue
from pjax.scheduler.request import Request, RequestStatus
from pjax.scheduler.sequence_table import UNKNOWN, SequenceTable

log = logging.getLogger(__name__)

SHORT_SHARE = 4  # short prompts get at most one in so many of a step's tokens, where long ones want them too

Observe = Callable[[Request, int, str | None], str | None]
"""Told each sequence's newest token: the sequence, its place in `plan.sampled`, and why it ends with this token, if it does. Returns the
stop string that its text ends with, if any; where it ends with reason "error", a message."""


class Scheduler:
    """All unfinished sequences: who waits, who runs in the next step, and which steps are under way. Owns the KV cache's bookkeeping."""

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
        seconds_per_priority: float = 60.0,
        num_host_slots: int = 0,
        preemption_mode: str = "auto",
        layout: KVCacheLayout | None = None,
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
        layout = layout or KVCacheLayout.uniform(1)
        self.pool = PagePool(num_pages, layout.num_reserved)
        self.table = SequenceTable(max_num_seqs, max_model_len)
        self.block_tables = BlockTables(len(layout.groups), max_num_seqs, -(-max_model_len // page_size))
        swap = SwapSpace(num_host_slots, page_size, preemption_mode)
        self.kv = KVManager(
            self.pool, self.block_tables, page_size, swap, layout, max_num_batched_tokens, enable_prefix_caching=enable_prefix_caching
        )
        self._seconds_per_priority = seconds_per_priority
        self._most_short = (max_num_batched_tokens - max_num_seqs) // SHORT_SHARE  # there is room for them though all rows decode
        self.waiting = WaitingQueue(self._most_short)
        self.running = RunningQueue()
        self.unfinished: dict[str, list[Request]] = {}
        """The unfinished sequences of each prompt, which share an id."""
        self.deadlines: RemovableHeap[str] = RemovableHeap()  # ids of those that have one
        self.steps: deque[StepPlan] = deque()
        """Steps under way, the oldest first: `schedule` appends to it, `commit`, `drop_steps` and `preempt_all` take from it."""
        self.num_preemptions = 0
        self._num_added = 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row or for pages."""
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        return len(self.running)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.unfinished)

    def waiting_lengths(self) -> list[int]:
        """Tokens of each waiting request."""
        return [request.num_tokens for request in self.waiting.ordered()]

    @property
    def num_waiting_sequences(self) -> int:
        """Sequences of the requests that wait."""
        return sum(1 + len(request.followers) for request in self.waiting)

    # ---- wait

    def add(self, request: Request, *others: Request) -> None:
        """Queues a request, and others that continue the same prompt under the same id.

        A level of priority counts as so many seconds of waiting. A request is so overtaken only by those of a better
        priority that come within a bounded time after it, and nobody starves; ranks need not be changed as time passes.

        Raises InvalidRequestError when it can never fit; then nothing has changed.
        """
        self.check_fits(request)
        sequences = [request, *others]
        self.unfinished[request.request_id] = sequences
        since = request.metrics.arrival_time + self._seconds_per_priority * request.priority
        for sequence in sequences:
            sequence.rank = since, self._num_added
            self._num_added += 1
        if request.deadline is not None:
            self.deadlines.add(request.request_id, request.deadline)
        size = len(self.table.tokens)  # more than there are rows: the next ones are led by one of their own
        for place in range(0, len(sequences), size):
            leader = sequences[place]
            leader.followers = sequences[place + 1 : place + size]
            for follower in leader.followers:
                follower.status = RequestStatus.FOLLOWING
            self._enqueue(leader)

    def check_fits(self, request: Request) -> None:
        """Raises InvalidRequestError when `add` would refuse a request. Changes nothing."""
        num_prompt, where = len(request.prompt_token_ids), f"(request {request.request_id!r})"
        if request.request_id in self.unfinished:
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
        if needed > self.pool.num_usable:
            raise InvalidRequestError(
                f"prompt and max_tokens need {needed} pages ({num_prompt} + {request.max_tokens} tokens), "
                f"but the page pool has {self.pool.num_usable} {where}"
            )

    def _enqueue(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        self.waiting.enqueue(request)

    # ---- schedule

    def schedule(self, now: float | None = None) -> StepPlan | None:
        """The next step, or None when there is nothing to do before the steps under way have ended.

        Pages for all its tokens are allocated. Steps are run and committed in the order in which they are planned.
        """
        budget = self.max_num_batched_tokens
        now = time.monotonic() if now is None else now
        given: dict[Request, int] = {}
        decode: list[tuple[Request, int]] = []
        prefill: list[tuple[Request, int]] = []
        for request in self.running:
            count = self._num_behind(request)
            if count > 0:
                (decode if count == 1 else prefill).append((request, count))
        prefill.sort(key=lambda row: row[1] > self._most_short)  # what is short or nearly done first
        num_preemptions = self.num_preemptions
        budget = self._extend_running(decode, given, budget)
        if self.waiting.short and self.num_preemptions == num_preemptions:
            budget -= self._admit_short(prefill, given, budget, now)
        budget = self._extend_running(prefill, given, budget)
        for request, count in given.items():
            self.kv.remember(request, min(request.num_computed + count, request.num_tokens))
        if self.num_preemptions == num_preemptions:
            self._admit(given, budget, now)
        while not given and self.waiting and not self.steps:
            self.preempt(self.running.last)  # all that run are beams that wait for one of those that don't
            self._admit(given, budget, now)
        return self._launch(given) if given else None

    def _num_behind(self, request: Request) -> int:
        """Tokens to compute next: none of a beam that waits to be continued, or where the token under way is the last one."""
        planned = request.num_planned
        if request.num_in_flight and (
            planned >= self.max_model_len or len(request.output_token_ids) + request.num_in_flight >= request.max_tokens
        ):
            return 0
        return planned - request.num_computed

    def _extend_running(self, rows: list[tuple[Request, int]], given: dict[Request, int], budget: int) -> int:
        """Gives running rows the tokens that they are behind, and their pages, for which the last ranks are preempted; the budget left."""
        for request, count in rows:
            if budget == 0:
                break
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted for an older one in this very step
            count = min(budget, count)
            while not self.kv.extend(request, request.num_computed + count):
                victim = self.running.last
                budget += given.pop(victim, 0)
                self.preempt(victim)
                if victim is request:
                    break
            else:
                given[request] = count
                budget -= count
        return budget

    def _admit_short(self, prefill: list[tuple[Request, int]], given: dict[Request, int], budget: int, now: float) -> int:
        """Starts short prompts past rows and waiting ones that want more than there is; how many tokens they take.

        Nobody loses a row, pages or more than its share of the budget for it, and no better priority is passed.
        """
        waiting, taken = self.waiting, 0
        if sum(count for _, count in prefill) + waiting.first.num_tokens <= budget:
            return 0
        # For the rows' prompts, and a page each to be copied.
        room = sum(self.kv.num_pages_for(count) + 2 * self.kv.num_groups for _, count in prefill)
        priority = min((request.priority for request, _ in prefill), default=waiting.first.priority)
        while waiting.short and (request := waiting.short.first).priority <= min(priority, waiting.first.priority):
            cached = self.kv.find_cached(request)
            count = request.num_tokens - cached.num_tokens
            num_rows, num_pages = len(request.followers) + 1, len(request.followers) * self.kv.num_groups + room
            if request is not (first := waiting.first):
                num_rows += len(first.followers) + 1
                num_pages += len(first.followers) * self.kv.num_groups + self.kv.num_pages_for(
                    min(first.num_tokens + 1, self.max_model_len)
                )
            if request.num_in_flight or taken + count > budget // SHORT_SHARE or self.table.num_free_rows < num_rows:
                break
            if not self.kv.can_start(cached, min(request.num_tokens + 1, self.max_model_len), more=num_pages):
                break
            taken += self._start(given, request, cached, count, now)
        return taken

    def _admit(self, given: dict[Request, int], budget: int, now: float) -> None:
        """Starts waiting requests in the order of their ranks, as far as there are rows, pages and budget."""
        waiting = self.waiting
        while waiting and budget > 0 and self.table.num_free_rows > len(waiting.first.followers):
            request = waiting.first
            if request.num_in_flight:
                break  # preempted in the meantime; its next token is not known yet
            # Room for all its tokens and one more, not only for the first chunk: else it would soon be preempted. Where budget
            # is left every running row has its pages already.
            most = min(request.num_tokens + 1, self.max_model_len)
            cached = self.kv.find_cached(request)
            if not self.kv.can_start(cached, most, more=len(request.followers) * self.kv.num_groups) and self.running:
                break
            budget -= self._start(given, request, cached, budget, now)

    def _start(self, given: dict[Request, int], request: Request, cached: CachedPrefix, budget: int, now: float) -> int:
        """Makes a waiting request run, on these cached pages, and gives it tokens of the step; how many of the budget."""
        self.waiting.remove(request)
        for sequence in (request, *request.followers):
            sequence.row = self.table.allocate_row()
        request.status = RequestStatus.RUNNING
        self.running.add(request)
        if request.metrics.first_scheduled_time is None:
            request.metrics.first_scheduled_time = now
        num_prompt = len(request.prompt_token_ids)
        self.table.tokens[request.row, :num_prompt] = request.prompt_token_ids
        self.table.tokens[request.row, num_prompt : request.num_tokens] = request.output_token_ids
        self.kv.start(request, cached)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed
        count = min(budget, request.num_tokens - request.num_computed)
        has_pages = self.kv.extend(request, request.num_computed + count)
        assert has_pages, f"request {request.request_id!r} was started without room for its pages"
        self.kv.remember(request, request.num_computed + count)
        given[request] = count
        return count

    def _launch(self, given: dict[Request, int]) -> StepPlan:
        """The plan; from here on its tokens count as computed, and those that it samples as in flight."""
        plan = StepPlan.make(given, self.kv.take_copies(), *self.kv.swap.take(), self.block_tables.take_changes())
        for request, count in given.items():
            request.num_computed += count
        for request in plan.sampled:
            if request.beam is None:
                self._fork_followers(request)
        # A beam's next token is not among these, but is written before it is read.
        self.table.tokens[plan.sample_rows, (plan.starts + plan.counts)[plan.sample_sources]] = UNKNOWN
        self._begin_step(plan)
        return plan

    def _begin_step(self, plan: StepPlan) -> None:
        """A step is under way. Tokens in flight are counted here and in `_end_step`, nowhere else."""
        self.steps.append(plan)
        for request in plan.sampled:
            request.num_in_flight += 1

    def _end_step(self) -> None:
        """The oldest step is no longer under way."""
        for request in self.steps.popleft().sampled:
            request.num_in_flight -= 1

    # ---- preempt

    def preempt(self, request: Request) -> None:
        """Frees a running request's pages; they are saved in host memory or computed again (Kwon et al. 2023, section 4.5).

        A beam that has its candidates needs no pages until it is continued.
        """
        self.kv.save(request)
        self.kv.remember(request, min(request.num_computed, request.num_tokens))
        self._requeue(request)

    def preempt_all(self) -> None:
        """Queues every running request again: a step failed, and the device may have lost its pages.

        What was under way is lost: it must not be committed. This holds wherever scheduling or committing was interrupted.
        """
        while self.steps:
            self._end_step()
        for request in reversed(list(self.running)):
            self._requeue(request)
        for sequences in self.unfinished.values():
            for sequence in sequences:
                self._free(sequence)  # what a start or a fork that failed half-way has left
        self.pool.forget()
        self.kv.swap.forget()

    def _requeue(self, request: Request) -> None:
        self._free(request)
        self.running.remove(request)
        request.status, request.num_computed = RequestStatus.FOLLOWING, 0
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        if request.candidates is None:
            self._enqueue(request)

    def _free(self, request: Request) -> None:
        """Frees a sequence's pages and row, and the rows of those that follow it."""
        self.kv.release(request)
        for sequence in (request, *request.followers):
            self._free_row(sequence)

    def _free_row(self, request: Request) -> None:
        if request.row >= 0:
            self.table.free_row(request.row)
            request.row = -1

    # ---- fork

    def _fork_followers(self, request: Request) -> None:
        """Lets those who follow a request go on from where it is: their prompt is computed."""
        while request.followers:
            self._fork(request, request.followers[-1])
            request.followers.pop()

    def _fork(self, request: Request, other: Request) -> None:
        """Makes another sequence of the same prompt go on from where this one is, on the same pages if both can run."""
        if other.status is RequestStatus.RUNNING:
            self.running.remove(other)
            self.kv.release(other)
            other.status = RequestStatus.FOLLOWING
        other.num_computed, other.num_cached_tokens = 0, request.num_cached_tokens
        other.output_token_ids, other.page_keys = list(request.output_token_ids), list(request.page_keys)
        other.epoch = request.epoch
        self.kv.swap.fork(request, other)
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
        self.running.add(other)

    # ---- take tokens

    def commit(
        self,
        plan: StepPlan,
        sampled: Sequence[int] | np.ndarray,
        now: float,
        top: Candidates | None = None,
        observe: Observe = lambda request, index, reason: None,
    ) -> list[Request]:
        """Takes the result of the oldest step under way: appends the sampled tokens, ends what is done.

        Args:
          sampled: a token for each of `plan.sampled`; below 0 where none could be sampled.
          now: seconds of `time.monotonic()`.
          top: of each of `plan.sampled` the likeliest tokens and their log-probabilities, [m, k] both; read for beams.
          observe: told each token of a sequence that is no beam, and each failure to sample one.

        Returns the sequences that got a token or ended with reason "error", and of a beam search that is done the last to catch up.
        Those aborted since the plan was made are skipped. What fails for one request, in `observe` too, ends that request alone.
        Raises ValueError, and changes nothing, when the plan is not of the oldest step.
        """
        if not self.steps or plan is not self.steps[0]:
            raise ValueError(f"the step is not the oldest of the {len(self.steps)} under way: steps are committed in their order")
        tokens = np.asarray(sampled).tolist()
        self._end_step()
        changed = []
        for index, (request, token) in enumerate(zip(plan.sampled, tokens, strict=True)):
            if request.status is RequestStatus.FINISHED:
                continue
            try:
                if token < 0:
                    self._take_failure(request, index, now, observe)
                elif request.beam is None:
                    self._take_token(request, token, index, now, observe)
                elif not self._take_candidates(request, request.beam, index, now, top):
                    continue
            except Exception as error:
                self.fail(request, error, now)
            changed.append(request)
        return changed

    def _take_token(self, request: Request, token: int, index: int, now: float, observe: Observe) -> None:
        """A sequence gets its next token, and ends if that or its text says so."""
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = now
        self._append(request, token)
        reason, stop_reason = self._why_it_ends(request, token)
        if (stop_string := observe(request, index, reason)) is not None:
            reason, stop_reason = "stop", stop_string
        if reason is not None:
            self.finish(request, reason, stop_reason, now)

    def _append(self, request: Request, token: int) -> None:
        if request.row >= 0:
            place = request.num_tokens
            if place < self.table.max_model_len:
                self.table.tokens[request.row, place] = token
        request.output_token_ids.append(token)

    def _why_it_ends(self, request: Request, token: int) -> tuple[str | None, int | str | None]:
        """Finish reason and stop reason of a sequence whose newest token is this one; None when it goes on."""
        if token in request.eos_token_ids:
            return "stop", None
        if token in request.stop_token_ids:
            return "stop", token
        if len(request.output_token_ids) >= request.max_tokens or request.num_tokens >= self.max_model_len:
            return "length", None
        return None, None

    def _take_failure(self, request: Request, index: int, now: float, observe: Observe) -> None:
        """No token could be sampled: a sequence, or the search of a beam, ends with reason "error". Its pages are not found again."""
        self.kv.distrust(request)
        message = observe(request, index, "error")
        if request.beam is None:
            self.finish(request, "error", message, now)
        else:
            self._finish_all(request.request_id, "error", message, now)

    def _take_candidates(self, request: Request, search: BeamSearch, index: int, now: float, top: Candidates | None) -> bool:
        """A beam has caught up. If it was preempted since it needs no pages until it is continued. Whether its search is done."""
        assert top is not None
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = now
        request.candidates = top[0][index], top[1][index]
        if request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
            request.status = RequestStatus.FOLLOWING
        self._continue_beams(search, self.unfinished[request.request_id], now)
        return search.done

    def _continue_beams(self, search: BeamSearch, sequences: list[Request], now: float) -> None:
        """Continues the beams of a search if all have their candidates; each parent's first child takes its place."""
        parents = [sequences[index] for index in search.beams]
        candidates = [parent.candidates for parent in parents if parent.candidates is not None]
        if len(candidates) < len(parents):
            return
        chosen = search.choose([parent.output_token_ids for parent in parents], candidates)
        if search.done:
            self._finish_all(sequences[0].request_id, "stop" if search.finished[0].ended else "length", None, now)
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

    # ---- finish

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None, now: float | None = None) -> None:
        """Ends an unfinished sequence and frees all it has.

        Args:
          now: when it has ended, for the request's metrics; None leaves them as they are.
        """
        if request.status is RequestStatus.RUNNING and reason != "error":
            self.kv.remember(request, min(request.num_computed, request.num_tokens))
        self._free(request)
        self.kv.swap.drop(request)
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        else:
            for leader in self.unfinished[request.request_id]:
                if request in leader.followers:
                    leader.followers.remove(request)
        request.status, request.finish_reason, request.stop_reason = RequestStatus.FINISHED, reason, stop_reason
        if now is not None:
            request.metrics.finished_time = now
        unfinished = self.unfinished[request.request_id]
        unfinished.remove(request)
        if not unfinished:
            del self.unfinished[request.request_id]
            if request.request_id in self.deadlines:
                self.deadlines.remove(request.request_id)

    def _finish_all(self, request_id: str, reason: str, stop_reason: str | None = None, now: float | None = None) -> bool:
        """Ends all sequences of a request; False when there is none of that id."""
        sequences = list(self.unfinished.get(request_id, ()))
        for sequence in reversed(sequences):  # followers before those whom they follow
            self.finish(sequence, reason, stop_reason, now)
        return bool(sequences)

    def abort(self, request_id: str) -> bool:
        """Ends all sequences of a request with reason "abort" and frees all they have; False when there is none of that id."""
        return self._finish_all(request_id, "abort")

    def expire(self, now: float) -> list[str]:
        """Ends the requests whose deadline has come, with reason "timeout", and frees all they have; their ids."""
        deadlines, expired = self.deadlines, []
        while deadlines and deadlines.smallest <= now:
            expired.append(deadlines.first)
            self._finish_all(deadlines.first, "timeout", now=now)
        return expired

    def fail(self, request: Request, error: Exception, now: float) -> None:
        """Ends a request, all its unfinished sequences, with reason "error": something went wrong with it on the host."""
        message = f"{type(error).__name__}: {error} (request {request.request_id!r})"
        log.error("%s", message, exc_info=error)
        self._finish_all(request.request_id, "error", message, now)

    def drop_steps(self) -> None:
        """Instead of `commit`, when all requests have ended: nobody waits for the steps under way."""
        assert not self.unfinished, "requests wait for the steps under way"
        while self.steps:
            self._end_step()

    # ---- check

    def check(self) -> None:
        """Proves the invariants; AssertionError with what breaks them."""
        waiting, running = self.waiting.ordered(), list(self.running)
        unfinished = [sequence for sequences in self.unfinished.values() for sequence in sequences]
        self.kv.check(running)
        self.kv.swap.check(sequence for sequence in unfinished if sequence.status is not RequestStatus.RUNNING)
        rows = [sequence.row for request in running for sequence in (request, *request.followers)]
        assert len(set(rows)) == len(rows) and len(rows) + self.table.num_free_rows == len(self.table.tokens), f"rows {rows}"
        for queue, status in ((waiting, RequestStatus.WAITING), (running, RequestStatus.RUNNING)):
            ranks = [request.rank for request in queue]
            assert ranks == sorted(ranks), f"{status.value} requests are out of order: {ranks}"
            assert all(request.status is status for request in queue)
        assert not waiting or self.waiting.first is waiting[0]
        assert set(self.waiting.short) <= set(waiting) and (self.waiting.num_short_tokens > 0) == (len(self.waiting.short) > 0)
        in_flight = Counter(request for plan in self.steps for request in plan.sampled)
        for request in {*unfinished, *in_flight}:
            assert request.num_in_flight == in_flight[request], (
                f"request {request.request_id!r} has {request.num_in_flight} tokens in flight"
            )
        for request in running:
            behind = request.num_computed < request.num_planned or request.num_in_flight > 0
            assert behind == (request.candidates is None), f"request {request.request_id!r} has nothing to compute"
        assert set(self.deadlines) == {name for name, (first, *_) in self.unfinished.items() if first.deadline is not None}
        followers = [follower for request in (*waiting, *running) for follower in request.followers]
        assert all(follower.status is RequestStatus.FOLLOWING for follower in followers)
        followers += [sequence for sequence in unfinished if sequence.status is RequestStatus.FOLLOWING and sequence.candidates]
        assert {*waiting, *running, *followers} == set(unfinished)
        assert len(waiting) + len(running) + len(followers) == len(unfinished)
