"""The engine: scheduler + runner + text. A step is schedule, execute, commit."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pjax.checkpoints.arena import Arena
from pjax.config import EngineConfig
from pjax.engine.agreement import begin, end, gather_hosts, raise_of_hosts, told
from pjax.engine.building import (
    Loading,
    build_intake,
    build_scheduler_and_runner,
    choose_sizes,
    fit_length,
    load_weights,
    open_parts,
    warm_up,
)
from pjax.engine.intake import Prompt
from pjax.engine.interrupts import uninterrupted
from pjax.engine.opening import open_tokenizer
from pjax.engine.stats import Counters, EngineStats, StepStats
from pjax.engine.views import Views
from pjax.errors import UnsupportedError
from pjax.models.given import match
from pjax.outputs import RequestOutput
from pjax.params import BeamSearchParams, SamplingParams
from pjax.runner import InFlight, StepResult
from pjax.scheduler import Request, RequestStatus, StepPlan

log = logging.getLogger(__name__)

LONG_PAUSE = 0.005  # seconds between two calls of `step`


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request that is not queued yet."""

    text: str | None
    requests: list[Request]


@dataclass(slots=True)
class _Dispatched:
    """The device's side of a step that is under way."""

    handle: InFlight
    started: float
    is_timed: bool = True
    """Whether the time from its start to its end is the step's own: no program was compiled meanwhile, and nobody paused."""


class LLMEngine:
    """Serves requests step by step.

    `add_request` accepts or refuses one at once; each `step` computes tokens for all that run and returns the outputs
    that changed. Not thread-safe.

    With `nnodes` the same is made on every host. On rank 0 it is as on one host; on the others it runs rank 0's steps, and ends
    the process (SystemExit, status 0) when rank 0's ends.

    `arena` is memory that a caller had got for the parameters while it was importing this; the rest is as `pjax.LLM` has it.
    """

    def __init__(
        self,
        model: Any,
        config: EngineConfig | None = None,
        *,
        params: Any = None,
        tokenizer: str | Path | None = None,
        skip_tokenizer_init: bool = False,
        progress: bool = True,
        arena: Arena | None = None,
    ) -> None:
        self.hosts = gather_hosts(model, config or EngineConfig(), params)
        with told(self.hosts):
            opened = open_parts(model, config or EngineConfig(), params, arena, self.hosts)
            sizes = choose_sizes(opened, self.hosts)
            opened = fit_length(opened, sizes[0])
            self.config, self.model_config, self.max_model_len = opened.config, opened.source.config, opened.max_model_len
            self._abstract = opened.source.abstract
            self._loading: Loading | None = load_weights(opened, progress=progress)  # beside all that follows
            is_module = not isinstance(model, str | Path)
            self.tokenizer = open_tokenizer(opened.source, tokenizer=tokenizer, skip=skip_tokenizer_init, is_module=is_module)
            self.scheduler, self.runner = build_scheduler_and_runner(opened, sizes)
            self._intake = build_intake(opened, self.tokenizer)
            self._views = Views(self.tokenizer)
            self._names = itertools.count()
            self._counters = Counters()
            self._dispatched: dict[StepPlan, _Dispatched] = {}  # of the scheduler's steps under way
            self._ready: list[RequestOutput] = []  # outputs that `step` has not returned yet
            self._last_scheduled: list[Request] = []
            self._last_end = self._last_return = 0.0
            self.on_step: Callable[[StepStats], None] | None = None
            """Called with each step's figures. An exception of it is logged, and changes nothing."""
            warm_up(self.runner, self.scheduler, self.config, progress=progress)
            if self.config.warmup_mode != "none" or self.hosts is not None:
                self._wait_for_weights_or_close()
        if self.hosts is not None:
            begin(self.hosts, self.runner)

    def _wait_for_weights(self) -> None:
        if self._loading is not None:
            self.runner.set_params(self._loading.wait())
            self._loading = None

    def _wait_for_weights_or_close(self) -> None:
        try:
            self._wait_for_weights()
        except BaseException:
            self.runner.close()  # whatever it is compiling in the background
            raise

    @property
    def params(self) -> Any:
        """The parameters, an NNX state of the very arrays that the steps read."""
        self._wait_for_weights()
        return jax.tree.unflatten(jax.tree.structure(self._abstract), self.runner.params)

    def update_params(self, params: Any, *, restart: bool = False) -> None:
        """Swaps the parameters between two steps, without a copy; cached prefixes are dropped.

        Requests that run go on with the keys and values that they have, or, with `restart`, compute all their tokens again.

        Args:
          params: a state as `params` gives it, a module, or a tree of dictionaries with its names; shapes and types must be the same.

        Raises ConfigError, and changes nothing, when they do not fit.
        """
        if self.hosts is not None:
            raise UnsupportedError(
                f"update_params with nnodes {self.hosts.size}: parameters are swapped on one host only; start the hosts anew"
            )
        given = match(self._abstract, params)
        self._wait_for_weights()
        self._end_steps()
        with uninterrupted():
            self.runner.set_params(given)
            if restart:
                self.scheduler.preempt_all()
            self.scheduler.kv.begin_epoch()

    def prefetch(self) -> None:
        """Starts compiling the programs that the waiting requests will need first, and does not wait for them."""
        lengths = self.scheduler.waiting_lengths()
        (most, budget), total = self.config.step_sizes, sum(lengths)
        rows = min(self.scheduler.num_waiting_sequences, most)
        chunks = {budget, total % budget} if total > budget else {total}
        if any(length > 1 for length in lengths):
            for chunk in sorted(chunks - {0}, reverse=True):  # in the order in which they are needed
                self.runner.prefetch_for(chunk, rows, decode_only=False)
        if rows:
            self.runner.prefetch_for(rows, rows, decode_only=True)

    # ---- requests

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams | None = None,
        request_id: str | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> str:
        """Queues a prompt (text or token ids) and returns its id.

        Args:
          cache_salt: its cached pages are shared only with requests of the same salt: whoever can't guess another's can't
            learn from the time to the first token what the other asked.
          priority: the lower, the earlier it is served; within one, first come, first served. One level counts as
            `EngineConfig.seconds_per_priority` of waiting, so that nobody waits for ever.
          timeout: seconds after which it ends with reason "timeout" and what it has by then.

        Raises InvalidRequestError at once when the request is wrong or can never fit; nothing else is affected.
        """
        request_id = self._free_id() if request_id is None else request_id
        return self.submit(self.prepare(prompt, params, request_id, cache_salt=cache_salt, priority=priority, timeout=timeout))

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams | None,
        request_id: str,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Prepared:
        """Does the part of `add_request` that needs the request alone, its tokens too. Any thread may call it at any time."""
        text = prompt if isinstance(prompt, str) else None
        requests = self._intake.requests(request_id, prompt, params, cache_salt=cache_salt, priority=priority, timeout=timeout)
        return Prepared(text, requests)

    def submit(self, prepared: Prepared) -> str:
        """Queues a prepared request and returns its id. InvalidRequestError when the id is in use or it can never fit."""
        requests = prepared.requests
        self.scheduler.check_fits(requests[0])
        views = self._views.make(prepared.text, requests)
        # Nothing can fail from here on: a request is queued whole or not at all.
        self._intake.give_seeds(requests)
        self._views.add(views)
        self.scheduler.add(*requests)
        return requests[0].request_id

    def share_intake(self, other: LLMEngine) -> None:
        """Takes requests as `other` does, an engine of the same model, and numbers those without a seed together with it."""
        self._intake = other._intake

    def _free_id(self) -> str:
        return next(name for name in map(str, self._names) if name not in self._views)

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """Ends a request, frees all it has, and returns what there is of it; None when there is none of that id."""
        with uninterrupted():
            ready = [output for output in self._ready if output.request_id == request_id]
            self._ready = [output for output in self._ready if output.request_id != request_id]
            if self.scheduler.abort(request_id):
                return self._output(request_id)
            return next((output for output in ready if output.finished), None)

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request is waiting or running, or has an output that `step` has not returned yet."""
        return self.scheduler.has_work or bool(self._ready)

    def num_beyond_rows(self, num_more: int = 0) -> int:
        """Requests that wait, and so many more, beyond those for which the next step has a row. Any thread may ask."""
        return max(self.scheduler.num_waiting + num_more - self.scheduler.table.num_free_rows, 0)

    @property
    def is_loading_or_compiling(self) -> bool:
        """Whether a step waits for weights or for a program, not for the device. Any thread may ask."""
        loading = self._loading
        return (loading is not None and not loading.is_done) or self.runner.programs.is_waiting

    def stats(self) -> EngineStats:
        """A snapshot of the engine's figures. Any thread may call it."""
        owners = self.scheduler.pool.owners()
        return EngineStats(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_pages=self.scheduler.pool.num_usable,
            num_used_pages=int(np.count_nonzero(owners)),
            num_cached_pages=self.scheduler.pool.num_kept,
            num_shared_pages=int(np.count_nonzero(owners > 1)),
            num_preemptions=self.scheduler.num_preemptions,
            num_compilations=self.runner.num_compilations,
            page_owners=owners,
            page_cached=self.scheduler.pool.keyed(),
            **asdict(self._counters),
        )

    @property
    def num_steps(self) -> int:
        """Steps that have ended, failed ones not among them."""
        return self._counters.num_steps

    # ---- the step

    def step(self) -> list[RequestOutput]:
        """Returns the requests that have something new, finished ones included: what is ready, or else what one step gives.

        Ready are requests whose timeout has passed, and outputs of steps that `update_params` has ended or that failed after they were
        made. They are returned at once, without a step, whatever becomes of the next one.

        With `async_scheduling` the next step is dispatched before the tokens of this one have come: its rows take them from the device.
        A sequence that turns out to have ended computes one row for nothing.
        """
        self._expire()
        if not self._ready:
            with self._recovery():
                self._run_step()
        outputs, self._ready = self._ready, []
        return outputs

    def _expire(self) -> None:
        """Ends the requests whose timeout has passed."""
        with uninterrupted():
            self._ready += [self._output(request_id) for request_id in self.scheduler.expire(time.monotonic())]

    def _run_step(self) -> None:
        """Starts what the device has room for, waits for the oldest step and commits it."""
        self._note_pause()
        # While a program is being compiled, the next step may need it: the tokens in flight would wait for that too.
        most = 2 if self.config.async_scheduling and not self.runner.programs.is_compiling else 1
        while len(self.scheduler.steps) < most and (plan := self._schedule()) is not None:
            self._dispatch(plan)
        if self.scheduler.steps:
            self._end_oldest()
        if not self.scheduler.has_work:
            self.scheduler.drop_steps()
            self._dispatched.clear()
        self._last_return = time.monotonic()

    def _end_steps(self) -> None:
        """Ends all steps under way; the next call of `step` returns their outputs."""
        with self._recovery():
            while self.scheduler.steps:
                self._end_oldest()

    @contextmanager
    def _recovery(self) -> Iterator[None]:
        """Queues every running request again when what is done in here fails: nothing is lost but time.

        That holds for Ctrl-C too. Outputs that are ready stay for the next step.
        """
        try:
            yield
        except BaseException as error:
            with uninterrupted():
                self._dispatched.clear()
                if self.hosts is not None:
                    raise_of_hosts(self.hosts, error)
                try:
                    self.runner.restore_pages()
                finally:
                    self.scheduler.preempt_all()
            raise

    @property
    def scheduled_last(self) -> set[str]:
        """Ids of the unfinished requests in the newest step; where scheduling it failed, of those that it may have failed for."""
        # An id may belong to another request by now.
        return {request.request_id for request in self._last_scheduled if request.status is not RequestStatus.FINISHED}

    def _schedule(self) -> StepPlan | None:
        with uninterrupted():
            try:
                plan = self.scheduler.schedule()
            except BaseException:
                self._last_scheduled = [*self.scheduler.running, *self.scheduler.waiting.ordered()[:1]]
                raise
        if plan is not None:
            self._last_scheduled = plan.requests
        return plan

    def _dispatch(self, plan: StepPlan) -> None:
        self._wait_for_weights()
        table, num_compilations = self.scheduler.table, self.runner.num_compilations
        started = time.monotonic()
        self._dispatched[plan] = _Dispatched(self.runner.dispatch(plan, table.tokens), started)
        if self.runner.num_compilations > num_compilations:
            self._forget_times()

    def _end_oldest(self) -> None:
        """Waits for the oldest step and commits it. Where the device fails, nothing has changed."""
        plan = self.scheduler.steps[0]
        result = self.runner.fetch(self._dispatched[plan].handle)
        with uninterrupted():  # Ctrl-C between two requests would leave some of them without their token
            now = time.monotonic()
            changed = self._commit(plan, result, now)
            self._record(plan, self._dispatched.pop(plan), changed, now)

    def _commit(self, plan: StepPlan, result: StepResult, now: float) -> list[Request]:
        """Takes what a step has computed, and makes the outputs of the requests that it changes; these."""
        changed = [*plan.requests, *plan.sampled]  # where committing fails half-way, any of them
        try:
            failed = self._observe_prompts(plan, result, now)
            top = result.top_tokens, result.top_logprobs
            changed = failed + self.scheduler.commit(plan, result.tokens, now, top, partial(self._views.observe, result))
        finally:
            ids = dict.fromkeys(request.request_id for request in changed if request in self._views)  # in the order of the plan
            self._ready += [self._output(request_id) for request_id in ids]
        return changed

    def _observe_prompts(self, plan: StepPlan, result: StepResult, now: float) -> list[Request]:
        """Takes log-probabilities of prompt tokens; the requests for which that failed."""
        first, failed = 0, []
        for index, start, stop in plan.scored:
            assert result.prompt is not None
            request = plan.requests[index]
            try:
                if request.status is not RequestStatus.FINISHED:
                    self._views.observe_prompt(request, result.prompt, first, start, stop)
            except Exception as error:
                self.scheduler.fail(request, error, now)
                failed.append(request)
            first += stop - start
        return failed

    def _output(self, request_id: str) -> RequestOutput:
        """A request as it is; forgotten when all its sequences have ended."""
        try:
            output = self._views.output(request_id)
        except Exception as error:
            self.scheduler.abort(request_id)
            output = self._views.failed_output(request_id, error)
        if output.finished:
            self._views.forget(request_id)
        return output

    # ---- figures

    def _note_pause(self) -> None:
        """A step that ended while nobody called says nothing about its time."""
        if not self.scheduler.steps or time.monotonic() - self._last_return <= LONG_PAUSE:
            return
        if self._dispatched[self.scheduler.steps[0]].handle.has_ended:
            self._forget_times()

    def _forget_times(self) -> None:
        for dispatched in self._dispatched.values():
            dispatched.is_timed = False

    def _record(self, plan: StepPlan, dispatched: _Dispatched, changed: Iterable[Request], now: float) -> None:
        """Counts a step that was committed, and tells `on_step`."""
        for request in changed:
            self._count(request)
        self._counters.num_steps += 1
        seconds = now - max(dispatched.started, self._last_end) if dispatched.is_timed else None
        prefill = int(plan.counts[plan.num_decode :].sum())
        if seconds is not None:
            self.scheduler.kv.swap.cost.observe_step(prefill, plan.num_tokens, seconds)
        self._last_end = now
        self._tell(StepStats(seconds, prefill, plan.num_decode, len(plan.rows)))

    def _count(self, request: Request) -> None:
        counters, search = self._counters, request.beam
        if request.finish_reason == "error":
            return
        counters.generation_tokens += 1 if search is None else sum(len(found.tokens) for found in search.finished)
        if search is not None or (request.index == 0 and len(request.output_token_ids) == 1):
            counters.prompt_tokens += len(request.prompt_token_ids)
            counters.prefix_cache_queries += len(request.prompt_token_ids) if self.config.enable_prefix_caching else 0
            counters.prefix_cache_hits += request.num_cached_tokens or 0

    def _tell(self, stats: StepStats) -> None:
        """Calls `on_step`; what fails there is the caller's, and no request's."""
        if self.on_step is None:
            return
        try:
            self.on_step(stats)
        except Exception:
            log.exception("on_step failed; requests go on")

    def close(self) -> None:
        """Stops the engine's threads, and the other hosts."""
        if self._loading is not None:
            self._loading.close()
        self.runner.close()
        if self.hosts is not None:
            end(self.hosts)
