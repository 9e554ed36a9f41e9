"""Continuous batching. There is no prefill phase and no decode phase.

Each sequence has `num_computed` tokens in the pages and catches up with its `num_tokens`; every step gives it
`min(budget, num_tokens - num_computed)`. That one rule carries chunked prefill, decode, and recomputation after a
preemption. Order within a step: rows that need one token, short prompts where long ones would take it all, the rest of the
running rows, then waiting ones, each the best rank first: by priority, and by arrival within one (`Lifecycle.add`). A waiting
one begins behind the full pages that are cached, also those that an earlier row computes in this very step.

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

import time
from collections.abc import Sequence

import numpy as np

from pjax.errors import ConfigError, InvalidRequestError
from pjax.kv_cache.block_tables import BlockTables
from pjax.kv_cache.kv_manager import CachedPrefix, KVManager
from pjax.kv_cache.layout import KVCacheLayout
from pjax.kv_cache.page_pool import PagePool
from pjax.kv_cache.swap_space import SwapSpace
from pjax.scheduler.beam_search import Candidates
from pjax.scheduler.plan import StepPlan
from pjax.scheduler.request import Request, RequestStatus
from pjax.scheduler.sequence_table import SequenceTable
from pjax.scheduler.sequences import Lifecycle

SHORT_SHARE = 4  # short prompts get at most one in so many of a step's tokens, where long ones want them too


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
        self._most_short = (max_num_batched_tokens - max_num_seqs) // SHORT_SHARE  # there is room for them though all rows decode
        self.sequences = Lifecycle(self.table, self.kv, seconds_per_priority, self._most_short)
        self._num_in_flight = 0  # steps planned and not committed

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row or for pages."""
        return len(self.sequences.waiting)

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        return len(self.sequences.running)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.sequences.unfinished)

    # ---- requests

    def waiting_lengths(self) -> list[int]:
        """Tokens of each waiting request."""
        return [request.num_tokens for request in self.sequences.waiting.ordered()]

    @property
    def num_waiting_sequences(self) -> int:
        """Sequences of the requests that wait."""
        return sum(1 + len(request.followers) for request in self.sequences.waiting)

    def add(self, request: Request, *others: Request) -> None:
        """Queues a request, and others that continue the same prompt under the same id.

        Raises InvalidRequestError when it can never fit; then nothing has changed.
        """
        self._check_fits(request)
        self.sequences.add([request, *others])

    def _check_fits(self, request: Request) -> None:
        num_prompt, where = len(request.prompt_token_ids), f"(request {request.request_id!r})"
        if request.request_id in self.sequences.unfinished:
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

    def abort(self, request_id: str) -> bool:
        """Ends all sequences of a request with reason "abort" and frees all they have; False when there is none of that id."""
        return self.sequences.finish_all(request_id, "abort")

    def expire(self, now: float) -> list[str]:
        """Ends the requests whose deadline has come, with reason "timeout", and frees all they have; their ids."""
        deadlines, expired = self.sequences.deadlines, []
        while deadlines and deadlines.smallest <= now:
            expired.append(deadlines.first)
            for sequence in self.sequences.unfinished[deadlines.first]:
                sequence.metrics.finished_time = now
            self.sequences.finish_all(deadlines.first, "timeout")
        return expired

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """Ends an unfinished sequence and frees all it has."""
        self.sequences.finish(request, reason, stop_reason)

    # ---- a step

    def schedule(self, now: float | None = None) -> StepPlan | None:
        """The next step, or None when there is nothing to do before the steps under way have ended.

        Pages for all its tokens are allocated. Steps are run and committed in the order in which they are planned.
        """
        budget, running = self.max_num_batched_tokens, self.sequences.running
        now = time.monotonic() if now is None else now
        given: dict[Request, int] = {}
        decode: list[tuple[Request, int]] = []
        prefill: list[tuple[Request, int]] = []
        for request in running:
            count = self._num_behind(request)
            if count > 0:
                (decode if count == 1 else prefill).append((request, count))
        prefill.sort(key=lambda row: row[1] > self._most_short)  # what is short or nearly done first
        num_preemptions = self.sequences.num_preemptions
        budget = self._advance(decode, given, budget)
        if self.sequences.waiting.short and self.sequences.num_preemptions == num_preemptions:
            budget -= self._admit_short(prefill, given, budget, now)
        budget = self._advance(prefill, given, budget)
        for request, count in given.items():
            self.kv.remember(request, min(request.num_computed + count, request.num_tokens))
        if self.sequences.num_preemptions == num_preemptions:
            self._admit(given, budget, now)
        while not given and self.sequences.waiting and not self._num_in_flight:
            self.sequences.preempt(running.last)  # all that run are beams that wait for one of those that don't
            self._admit(given, budget, now)
        return self._launch(given) if given else None

    def _advance(self, rows: list[tuple[Request, int]], given: dict[Request, int], budget: int) -> int:
        """Gives running rows the tokens that they are behind, and their pages, for which the last ranks are preempted; the budget left."""
        running = self.sequences.running
        for request, count in rows:
            if budget == 0:
                break
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted for an older one in this very step
            count = min(budget, count)
            while not self.kv.extend(request, request.num_computed + count):
                victim = running.last
                budget += given.pop(victim, 0)
                self.sequences.preempt(victim)
                if victim is request:
                    break
            else:
                given[request] = count
                budget -= count
        return budget

    def _num_behind(self, request: Request) -> int:
        """Tokens to compute next: none of a beam that waits to be continued, or where the token under way is the last one."""
        planned = request.num_planned
        if request.num_in_flight and (
            planned >= self.max_model_len or len(request.output_token_ids) + request.num_in_flight >= request.max_tokens
        ):
            return 0
        return planned - request.num_computed

    def _launch(self, given: dict[Request, int]) -> StepPlan:
        """The plan; from here on its tokens count as computed, and those that it samples as under way."""
        plan = StepPlan.make(given, self.kv.take_copies(), *self.kv.swap.take(), self.block_tables.take_changes())
        self._num_in_flight += 1
        for request, count in given.items():
            request.num_computed += count
        for request in plan.sampled:
            if request.followers and request.beam is None:
                self.sequences.fork_followers(request)
        self.sequences.expect(plan)
        return plan

    def _admit_short(self, prefill: list[tuple[Request, int]], given: dict[Request, int], budget: int, now: float) -> int:
        """Admits short prompts past rows and waiting ones that want more than there is; how many tokens they take.

        Nobody loses a row, pages or more than its share of the budget for it, and no better priority is passed.
        """
        waiting, taken = self.sequences.waiting, 0
        if sum(count for _, count in prefill) + waiting.first.num_tokens <= budget:
            return 0
        room = sum(
            self.kv.num_pages_for(count) + 2 * self.kv.num_groups for _, count in prefill
        )  # of the rows' prompts, and a page each to be copied
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

    def _start(self, given: dict[Request, int], request: Request, cached: CachedPrefix, budget: int, now: float) -> int:
        """Admits a request, whose pages are there; how many tokens of the budget it takes."""
        self.sequences.start(request, cached, now)
        count = min(budget, request.num_tokens - request.num_computed)
        self.kv.extend(request, request.num_computed + count)
        self.kv.remember(request, request.num_computed + count)
        given[request] = count
        return count

    def _admit(self, given: dict[Request, int], budget: int, now: float) -> None:
        waiting = self.sequences.waiting
        while waiting and budget > 0 and self.table.num_free_rows > len(waiting.first.followers):
            request = waiting.first
            if request.num_in_flight:
                break  # preempted in the meantime; its next token is not known yet
            # Room for all its tokens and one more, not only for the first chunk: else it would soon be preempted. Where budget
            # is left every running row has its pages already.
            most = min(request.num_tokens + 1, self.max_model_len)
            cached = self.kv.find_cached(request)
            if not self.kv.can_start(cached, most, more=len(request.followers) * self.kv.num_groups) and self.sequences.running:
                break
            budget -= self._start(given, request, cached, budget, now)

    def preempt_all(self) -> None:
        """Every running request waits and will be computed again: a step failed, and the device may have lost its pages.

        What was under way is lost: it must not be committed.
        """
        self._num_in_flight = 0
        for sequences in self.sequences.unfinished.values():
            for sequence in sequences:
                sequence.num_in_flight = 0
        for request in reversed(list(self.sequences.running)):
            self.sequences.preempt(request, save=False)
        self.pool.forget()
        self.kv.swap.forget()

    def commit(self, plan: StepPlan, sampled: Sequence[int] | np.ndarray, now: float, top: Candidates | None = None) -> list[Request]:
        """Takes the result of the oldest step under way: appends the sampled tokens, ends what is done.

        Args:
          sampled: a token for each of `plan.sampled`; below 0 where none could be sampled.
          now: seconds of `time.monotonic()`.
          top: of each of `plan.sampled` the likeliest tokens and their log-probabilities, [m, k] both; read for beams.

        Returns the sequences that got a token or ended with reason "error", for want of one, and of a beam search that is done the
        last to catch up. Those aborted since the plan was made are skipped. What fails for one request ends that request alone.
        """
        self._num_in_flight -= 1
        changed = []
        for index, (request, token) in enumerate(zip(plan.sampled, np.asarray(sampled).tolist(), strict=True)):
            request.num_in_flight -= 1
            if request.status is RequestStatus.FINISHED:
                continue
            try:
                candidates = None if request.beam is None or top is None else (top[0][index], top[1][index])
                if self._take(request, token, candidates, now):
                    changed.append(request)
            except Exception as error:
                self.fail(request, error)
                changed.append(request)
        return changed

    def _take(self, request: Request, token: int, candidates: Candidates | None, now: float) -> bool:
        """Takes what a step has sampled for a sequence; whether there is news of it."""
        if token < 0:
            self.sequences.fail(request)
            return True
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = now
        if request.beam is not None:
            assert candidates is not None
            self.sequences.take_candidates(request, candidates)
            self.sequences.advance(request.beam, self.sequences.unfinished[request.request_id])
            return request.beam.done
        self.sequences.append(request, token)
        self._stop(request, token)
        return True

    def fail(self, request: Request, error: Exception) -> None:
        """Ends a request, all its unfinished sequences, with reason "error": something went wrong with it on the host."""
        for sequence in (request, *self.sequences.unfinished.get(request.request_id, ())):
            sequence.error = error
        self.sequences.finish_all(request.request_id, "error")
        request.finish_reason = "error"

    def drop(self, plan: StepPlan) -> None:
        """Instead of `commit`, for a step all of whose sequences have ended: nobody waits for its tokens."""
        assert all(request.status is RequestStatus.FINISHED for request in plan.sampled)
        self._num_in_flight -= 1

    def _stop(self, request: Request, token: int) -> None:
        if token in request.eos_token_ids:
            self.finish(request, "stop")
        elif token in request.stop_token_ids:
            self.finish(request, "stop", token)
        elif len(request.output_token_ids) >= request.max_tokens or request.num_tokens >= self.max_model_len:
            self.finish(request, "length")

    def check(self) -> None:
        """Proves the invariants; AssertionError with what breaks them."""
        self.sequences.check()
