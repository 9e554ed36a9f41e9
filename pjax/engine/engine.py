"""The engine: scheduler + runner + text. A step is schedule, execute, commit."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjax.checkpoints.arena import Arena
from pjax.config import EngineConfig
from pjax.engine.agreement import agree_on_model, agree_on_sizes, begin, end, gather_hosts, raise_of_hosts, told
from pjax.engine.intake import Intake, Prompt
from pjax.engine.interrupts import uninterrupted
from pjax.engine.opening import TokenizerOf, bytes_to_come, open_source, open_tokenizer
from pjax.engine.stats import Counters, EngineStats, StepStats
from pjax.engine.views import Views
from pjax.errors import ConfigError, UnsupportedError
from pjax.kv_cache.layout import KVCacheLayout, make_layout, specs_of
from pjax.memory import choose_num_pages, choose_num_slots, describe_pool
from pjax.models import ModelSource
from pjax.models.given import match
from pjax.models.sharding import choose_mesh
from pjax.outputs import RequestOutput
from pjax.params import BeamSearchParams, SamplingParams
from pjax.runner import InFlight, ModelRunner, RunnerConfig, StepResult, can_keep, use_compilation_cache
from pjax.scheduler import Request, RequestStatus, Scheduler, StepPlan

log = logging.getLogger(__name__)

ASSUMED_COPY_RATE = 5e9  # bytes per second between device and host, until it is measured
LONG_PAUSE = 0.005  # seconds between two calls of `step`


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request that is not queued yet."""

    text: str | None
    requests: list[Request]


@dataclass(slots=True)
class _Step:
    """A step on its way."""

    plan: StepPlan
    running: InFlight
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
        config = config or EngineConfig()
        self.hosts = gather_hosts(model, config, params)
        with told(self.hosts):
            tokenizer_of = partial(
                open_tokenizer, tokenizer=tokenizer, skip=skip_tokenizer_init, is_module=not isinstance(model, str | Path)
            )
            self._prepare(model, config, params, tokenizer_of, progress, arena)
        if self.hosts is not None:
            begin(self.hosts, self.runner)

    def _prepare(self, model: Any, config: EngineConfig, params: Any, tokenizer: TokenizerOf, progress: bool, arena: Arena | None) -> None:
        mesh = choose_mesh(config)
        platform = jax.default_backend() if mesh is None else str(mesh.devices.flat[0].platform)
        self.config = config = config.for_platform(platform)
        source, layer_mode = open_source(model, config, platform, mesh, arena)
        agree_on_model(self.hosts, source)
        self._abstract = source.abstract
        given = None if params is None else match(source.abstract, params)
        self.max_model_len = self._resolve_length(source.config.max_position)
        kv_dtype = "float32" if platform == "cpu" else jnp.dtype(source.dtype).name
        devices = () if mesh is None else mesh.local_devices
        layout = make_layout(specs_of(source.own_config), self.max_model_len)
        sizes = self._choose_sizes(source, layout, bytes_to_come(source, arena), kv_dtype, devices)  # before weights take memory
        self._loading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pjax-load")
        load = partial(source.load, progress=progress) if given is None else lambda: given
        self._weights: Future[Any] | None = self._loading.submit(load)  # beside all that follows
        self.tokenizer = tokenizer(source)
        self.model_config = source.config
        each = "" if source.shares is None else f" on each of {source.shares.size} devices"
        log.info("%s: %.2f GiB of %s weights%s, layers by %s", source.path.name, source.num_bytes / 2**30, source.dtype, each, layer_mode)
        steps = use_compilation_cache(config.compilation_cache_dir, whole_steps=can_keep(source, config, platform))
        self.scheduler, self.runner = self._build(source, layout, kv_dtype, sizes, steps)
        self._intake = Intake(
            self.tokenizer,
            vocab_size=source.config.vocab_size,
            eos_token_ids=frozenset(source.eos_token_ids) | frozenset(self.tokenizer.eos_token_ids if self.tokenizer else ()),
            max_model_len=self.max_model_len,
            max_num_seqs=config.step_sizes[0],
            seed=config.seed or 0,
            logits_processors=frozenset(config.logits_processors),
        )
        self._views = Views(self.tokenizer)
        self._names = itertools.count()
        self._counters = Counters()
        self._in_flight: deque[_Step] = deque()
        self._ready: list[RequestOutput] = []  # of steps that ended between two calls
        self._last_end = self._last_return = 0.0
        self.on_step: Callable[[StepStats], None] | None = None
        """Called with each step's figures. An exception of it is logged, and changes nothing."""
        self._last_plan: StepPlan | None = None
        if config.warmup_mode == "all":
            self.runner.warmup(progress=progress)
            if copied := self.runner.measure_swap():
                self.scheduler.kv.swap.cost.observe_copy(*copied)
        elif config.warmup_mode == "background":
            self.runner.warm_in_background()
        if config.warmup_mode != "none" or self.hosts is not None:
            try:
                self._wait_for_weights()
            except BaseException:
                self.runner.close()  # whatever it is compiling in the background
                raise

    def _choose_sizes(
        self, source: ModelSource, layout: KVCacheLayout, weight_bytes: int, kv_dtype: str, devices: Sequence[Any]
    ) -> tuple[int, int]:
        """Pages of the pool, and for how many of them there is host memory."""
        config = self.config
        num_pages = choose_num_pages(config, layout, kv_dtype, self.max_model_len, weight_bytes=weight_bytes, devices=devices)
        num_shares = 1 if source.shares is None else min(source.shares.size, len(devices))  # of which this host keeps pages
        num_slots = choose_num_slots(config, num_pages, layout.page_bytes(config.page_size, jnp.dtype(kv_dtype).itemsize) * num_shares)
        num_pages, num_slots = agree_on_sizes(self.hosts, num_pages, num_slots)
        return num_pages, num_slots

    def _build(
        self, source: ModelSource, layout: KVCacheLayout, kv_dtype: str, sizes: tuple[int, int], steps: Path | None
    ) -> tuple[Scheduler, ModelRunner]:
        config, (num_pages, num_slots) = self.config, sizes
        log.info("%s", describe_pool(num_pages, config.page_size, self.max_model_len, layout, config.step_sizes[1]))
        limits: dict[str, Any] = {
            "layout": layout,
            "num_pages": num_pages,
            "page_size": config.page_size,
            "max_model_len": self.max_model_len,
            "max_num_seqs": config.step_sizes[0],
            "max_num_batched_tokens": config.step_sizes[1],
            "num_host_slots": num_slots,
        }
        scheduler = Scheduler(
            **limits,
            enable_prefix_caching=config.enable_prefix_caching,
            seconds_per_priority=config.seconds_per_priority,
            preemption_mode=config.preemption_mode,
        )
        page_bytes = layout.page_bytes(config.page_size, jnp.dtype(kv_dtype).itemsize)
        scheduler.kv.swap.cost.observe_copy(1, page_bytes / ASSUMED_COPY_RATE)
        limits |= {name: getattr(config, name) for name in ("attention_backend", "logits_processors")}
        return scheduler, ModelRunner(source, RunnerConfig(**limits, kv_cache_dtype=kv_dtype, step_folder=steps))

    def _wait_for_weights(self) -> None:
        if self._weights is not None:
            self.runner.set_params(self._weights.result())
            self._weights = None
            self._loading.shutdown()

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
        self._drain()
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

    def _resolve_length(self, limit: int) -> int:
        wanted = self.config.max_model_len
        if wanted is not None and wanted > limit:
            raise ConfigError(f"max_model_len is {wanted}, but the model's own limit is {limit}")
        return wanted or limit

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
        self.scheduler.add(*requests)
        self._intake.give_seeds(requests)
        self._views.add(prepared.text, requests, requests[0].params)
        return requests[0].request_id

    def share_intake(self, other: LLMEngine) -> None:
        """Takes requests as `other` does, an engine of the same model, and numbers those without a seed together with it."""
        self._intake = other._intake

    def _free_id(self) -> str:
        return next(name for name in map(str, self._names) if name not in self._views)

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """Ends a request, frees all it has, and returns what there is of it; None when there is none of that id."""
        ready = [output for output in self._ready if output.request_id == request_id]
        self._ready = [output for output in self._ready if output.request_id != request_id]
        if self.scheduler.abort(request_id):
            return self._output(request_id)
        return next((output for output in ready if output.finished), None)

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request is waiting or running, or has an output that `step` has not returned yet."""
        return self.scheduler.has_work or bool(self._ready)

    @property
    def num_waiting_without_row(self) -> int:
        """Requests that wait, beyond those for which the next step has a row."""
        return max(self.scheduler.num_waiting - self.scheduler.table.num_free_rows, 0)

    @property
    def is_loading_or_compiling(self) -> bool:
        """Whether a step waits for weights or for a program, not for the device. Any thread may ask."""
        weights = self._weights
        return (weights is not None and not weights.done()) or self.runner.programs.is_waiting

    def stats(self) -> EngineStats:
        """A snapshot of the engine's figures. Any thread may call it."""
        owners = self.scheduler.pool.owners()
        return EngineStats(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_pages=len(owners),
            num_used_pages=int(np.count_nonzero(owners)),
            num_cached_pages=self.scheduler.pool.num_kept,
            num_shared_pages=int(np.count_nonzero(owners > 1)),
            num_preemptions=self.scheduler.sequences.num_preemptions,
            num_compilations=self.runner.num_compilations,
            page_owners=owners,
            page_cached=self.scheduler.pool.keyed(),
            **asdict(self._counters),
        )

    # ---- the step

    @property
    def scheduled_last(self) -> set[str]:
        """Ids of the unfinished requests in the newest step."""
        if self._last_plan is None:
            return set()
        # An id may belong to another request by now.
        return {request.request_id for request in self._last_plan.requests if request.status is not RequestStatus.FINISHED}

    def step(self) -> list[RequestOutput]:
        """Waits for one step and returns the requests that got a token, finished ones included; or those whose time is up.

        With `async_scheduling` the step after it is on its way before that: its rows take from the device the tokens that the
        host does not know yet. A sequence that turns out to have ended computes one row for nothing.
        """
        with uninterrupted():
            if expired := self.scheduler.expire(time.monotonic()):
                self._ready += [self._output(request_id) for request_id in expired]
        if expired:
            return self._take_ready()  # at once, whatever becomes of the next step
        self._note_pause()
        with self._recovery():
            # While a program is being compiled, the next step may need it: the tokens in flight would wait for that too.
            ahead = self.config.async_scheduling and not self.runner.programs.is_compiling
            while len(self._in_flight) < 1 + ahead and (plan := self._plan()) is not None:
                self._dispatch(plan)
            if self._in_flight:
                self._end_oldest()
        while self._in_flight and not self.scheduler.has_work:
            self.scheduler.drop(self._in_flight.popleft().plan)
        self._last_return = time.monotonic()
        return self._take_ready()

    def _take_ready(self) -> list[RequestOutput]:
        outputs, self._ready = self._ready, []
        return outputs

    @contextmanager
    def _recovery(self) -> Iterator[None]:
        """Queues every running request again when what is done in here fails: nothing is lost but time.

        That holds for Ctrl-C too. Outputs that are ready stay for the next step.
        """
        try:
            yield
        except BaseException as error:
            with uninterrupted():
                self._in_flight.clear()
                if self.hosts is not None:
                    raise_of_hosts(self.hosts, error)
                try:
                    self.runner.restore_pages()
                finally:
                    self.scheduler.preempt_all()
            raise

    def _plan(self) -> StepPlan | None:
        with uninterrupted():
            return self.scheduler.schedule()

    def _dispatch(self, plan: StepPlan) -> None:
        self._wait_for_weights()
        self._last_plan = plan
        table, num_compilations = self.scheduler.table, self.runner.num_compilations
        started = time.monotonic()
        running = self.runner.dispatch(plan, table.tokens)
        self._in_flight.append(_Step(plan, running, started))
        if self.runner.num_compilations > num_compilations:
            self._forget_times()

    def _end_oldest(self) -> None:
        """Waits for the oldest step and commits it. Where the device fails, nothing has changed."""
        step = self._in_flight[0]
        result = self.runner.fetch(step.running)
        with uninterrupted():  # Ctrl-C between two requests would leave some of them without their token
            self._in_flight.popleft()
            self._ready += self._commit(step, result)

    def _note_pause(self) -> None:
        """A step that ended while nobody called says nothing about its time."""
        if self._in_flight and time.monotonic() - self._last_return > LONG_PAUSE and self._in_flight[0].running.has_ended:
            self._forget_times()

    def _forget_times(self) -> None:
        for step in self._in_flight:
            step.is_timed = False

    def _commit(self, step: _Step, result: StepResult) -> list[RequestOutput]:
        now, plan = time.monotonic(), step.plan
        places = {id(request): index for index, request in enumerate(plan.sampled)}
        changed: dict[str, None] = {}  # in the order of the plan
        for request in self._observe_prompts(plan, result):
            changed[request.request_id] = None
        for request in self.scheduler.commit(plan, result.tokens, now, (result.top_tokens, result.top_logprobs)):
            try:
                self._observe(request, result, places[id(request)], now)
            except Exception as error:
                self._fail(request, error)
            self._count(request)
            changed[request.request_id] = None
        self._counters.num_steps += 1
        outputs = [self._output(request_id) for request_id in changed]
        seconds = now - max(step.started, self._last_end) if step.is_timed else None
        prefill = int(plan.counts[plan.num_decode :].sum())
        if seconds is not None:
            self.scheduler.kv.swap.cost.observe_step(prefill, plan.num_tokens, seconds)
        self._last_end = now
        self._tell(StepStats(seconds, prefill, plan.num_decode, len(plan.rows)))
        return outputs

    def _observe_prompts(self, plan: StepPlan, result: StepResult) -> list[Request]:
        """Takes log-probabilities of prompt tokens; the requests for which that failed."""
        first, failed = 0, []
        for index, start, stop in plan.scored:
            assert result.prompt is not None
            try:
                self._views.observe_prompt(plan.requests[index], result.prompt, first, start, stop)
            except Exception as error:
                self._fail(plan.requests[index], error)
                failed.append(plan.requests[index])
            first += stop - start
        return failed

    def _output(self, request_id: str) -> RequestOutput:
        try:
            return self._views.output(request_id)
        except Exception as error:
            self.scheduler.abort(request_id)
            return self._views.failed_output(request_id, error)

    def _fail(self, request: Request, error: Exception) -> None:
        """Ends a request for which something went wrong on the host; all others go on."""
        self.scheduler.fail(request, error)
        request.metrics.finished_time = time.monotonic()
        self._views.fail(request, 0)

    def _tell(self, stats: StepStats) -> None:
        """Calls `on_step`; what fails there is the caller's, and no request's."""
        if self.on_step is None:
            return
        try:
            self.on_step(stats)
        except Exception:
            log.exception("on_step failed; requests go on")

    def _drain(self) -> None:
        """Ends what is in flight; the next step returns its outputs."""
        with self._recovery():
            while self._in_flight:
                self._end_oldest()

    def _observe(self, request: Request, result: StepResult, index: int, now: float) -> None:
        if request.finish_reason == "error":
            self._views.fail(request, int(result.tokens[index]))
        elif request.beam is None:
            stop = self._views.observe(request, result, index)
            if stop is not None and request.finish_reason is None:
                self.scheduler.finish(request, "stop", stop)
            elif stop is not None:
                request.finish_reason, request.stop_reason = "stop", stop
        if request.finish_reason is not None:
            request.metrics.finished_time = now

    def _count(self, request: Request) -> None:
        counters, search = self._counters, request.beam
        if request.finish_reason == "error":
            return
        counters.generation_tokens += 1 if search is None else sum(len(found.tokens) for found in search.finished)
        if search is not None or (request.index == 0 and len(request.output_token_ids) == 1):
            counters.prompt_tokens += len(request.prompt_token_ids)
            counters.prefix_cache_queries += len(request.prompt_token_ids) if self.config.enable_prefix_caching else 0
            counters.prefix_cache_hits += request.num_cached_tokens or 0

    def close(self) -> None:
        """Stops the engine's threads, and the other hosts."""
        self._loading.shutdown(wait=False, cancel_futures=True)
        self.runner.close()
        if self.hosts is not None:
            end(self.hosts)
