"""Holds parameters, pages and compiled steps; runs plans on the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from tqdm import tqdm

from pjax.errors import ConfigError
from pjax.hosts.codec import Arrays, encode
from pjax.machine import num_cpus
from pjax.models import ModelSource
from pjax.models.sharding import MODEL_AXIS
from pjax.pallas_kernels.pages import new_pool, page_bytes, pool_format, pool_shape, touching, use_large_pages
from pjax.params import MAX_CANDIDATES, LogitRules
from pjax.runner.adjust import LogitsProcessor
from pjax.runner.batch import Bucket, Ints, find_bucket, input_struct, make_buckets, pack
from pjax.runner.executables import Executables
from pjax.runner.mirror import COMPILE, Mirror, NewRow
from pjax.runner.processors import check_processors
from pjax.runner.prompt_logprobs import PromptScores
from pjax.runner.rules import as_row, empty_tables, write_row, write_tokens, zeros
from pjax.runner.sampler import ROWS, Sampled
from pjax.runner.sampling_arrays import SamplingTable, flags_of
from pjax.runner.step import POOL_SPEC, jit_step, make_step, shard_step
from pjax.runner.swap import PageSwap
from pjax.runner.vocabulary import WHOLE, Vocabulary
from pjax.scheduler.plan import StepPlan

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
SHORT_STEP, FEW_ROWS = 64, 8  # tokens and rows of a lazy engine's steps that go without large pages for the pool
FEW_CORES = 2  # that one compilation keeps busy: the step that is needed first has them to itself


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """Sizes that the device side needs; all checked by the engine."""

    num_pages: int  # of one layer
    page_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_dtype: str
    attention_backend: str | None = None
    num_host_slots: int = 0  # pages of preempted requests in host memory
    logits_processors: Mapping[str, LogitsProcessor] = field(default_factory=dict)
    step_folder: Path | None = None  # where compiled steps are kept


@dataclass(frozen=True, slots=True)
class StepResult:
    """On the host, by `plan.sampled`: its token and, if any of them asked, its log-probabilities."""

    tokens: Ints
    logprobs: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    ranks: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    top_tokens: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    top_logprobs: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    prompt: PromptScores | None = None
    """Of the tokens of `plan.scored`, one after the other; None when there are none."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step that was dispatched."""

    sampled: Sampled
    prompt: PromptScores | None
    num_samples: int
    wants_logprobs: bool
    num_scored: int

    def wait(self) -> None:
        """Until it has ended. An exception of the device comes here."""
        jax.block_until_ready(self.sampled.tokens)


class ModelRunner:
    """Runs plans on the device. A compiled step exists for each bucket; a missing one is compiled when it is needed.

    `num_compilations` counts them, and the copies between pages and host memory; after `warmup()` it does not change.
    """

    def __init__(self, model: ModelSource, config: RunnerConfig) -> None:
        self.config = config
        self.buckets = make_buckets(config.max_num_seqs, config.max_num_batched_tokens)
        self._num_steps_compiled = 0
        self._abstract_params, self._structure = jax.tree.flatten(model.abstract)
        self._params: list[jax.Array] | None = None
        c, shares = model.own_config, model.shares
        pool_sharding: Sharding = SingleDeviceSharding(jax.local_devices()[0])
        self._input_sharding: Sharding | None = None
        if shares is not None:
            pool_sharding = NamedSharding(shares.mesh, POOL_SPEC)
            self._input_sharding = NamedSharding(shares.mesh, PartitionSpec())
        num_heads = c.num_kv_heads * (1 if shares is None else shares.size)
        shape = pool_shape(c.num_layers, config.num_pages, config.page_size, num_heads, c.head_size)
        self._pool_format = pool_format(pool_sharding)
        self._pool_struct = jax.ShapeDtypeStruct(shape, config.kv_cache_dtype, sharding=self._pool_format)
        tokens_shape = (config.max_num_seqs, config.max_model_len)
        self._tokens_struct = jax.ShapeDtypeStruct(tokens_shape, jnp.int32, sharding=self._input_sharding)
        facts = (model.graph, self._abstract_params, c, replace(config, num_host_slots=0, logits_processors={}, step_folder=None))
        self._executables = Executables(config.step_folder, *facts)
        self._has_large_pages = False
        try:
            self._pages, self._tokens = self._new_pool(), self._new_tokens()
        except (RuntimeError, MemoryError) as error:
            size = config.num_pages * page_bytes(c.num_layers, config.page_size, c.num_kv_heads, c.head_size, config.kv_cache_dtype)
            raise ConfigError(f"the page pool of {size / 2**30:.2f} GiB does not fit the device: {error}") from error
        self._swap = PageSwap(config.num_host_slots, c.num_layers, self._pool_struct, self._pool_format) if config.num_host_slots else None
        self._sampling = SamplingTable(config.max_num_seqs)
        self._vocab_size = model.config.vocab_size
        self._rules = empty_tables(config.max_num_seqs, self._vocab_size, self._input_sharding)
        processors = config.logits_processors
        check_processors(processors, [min(bucket.num_rows, ROWS) for bucket in self.buckets], config.max_model_len, self._vocab_size)
        self._processors = {name: index for index, name in enumerate(processors)}
        vocabulary = WHOLE if shares is None else Vocabulary(MODEL_AXIS, self._vocab_size)
        most = min(MAX_CANDIDATES, self._vocab_size)
        step = make_step(model.graph, self._structure, most, config.attention_backend, vocabulary, tuple(processors.values()))
        self._step = step if shares is None else shard_step(step, shares)
        self._compiled: dict[Bucket, Any] = {}
        self._pending: dict[Bucket, Future[Any]] = {}
        self._is_closed = False
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="pjax-compile")
        self._mirror = Mirror(config.max_num_seqs, config.max_model_len, config.page_size)
        self.announce: Callable[[bytes], AbstractContextManager[None]] | None = None
        """Called with each step's message; inside of what it gives the step is dispatched. Other hosts run it too, by `follow`."""
        self.on_compiled: Callable[[], None] | None = None
        """Called when a step that is needed now has been compiled, before it runs: on other hosts that may take longer."""

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far; none after `warmup()`."""
        return self._num_steps_compiled + (self._swap.num_compilations if self._swap is not None else 0)

    def set_params(self, params: Any) -> None:
        """Gives the weights, a state as `ModelSource.load` returns it; compilation may begin before."""
        self._params = jax.tree.leaves(params)

    @property
    def params(self) -> list[jax.Array]:
        """The weights, flat."""
        assert self._params is not None, "weights are given before anything runs"
        return self._params

    def dispatch(self, plan: StepPlan, tokens: Ints, block_tables: Ints) -> InFlight:
        """Starts a step and does not wait for it. Steps run one after the other, in the order of their dispatch.

        Args:
          tokens: int32 [rows, max_model_len], block_tables: int32 [rows, W]: the scheduler's tables. They may change as soon as
            this returns.
        """
        new_rows = [made for request in plan.sampled if (made := self._new_row(request)) is not None]
        if self.announce is None:
            return self._start(plan, tokens, block_tables, new_rows)
        with self.announce(self._mirror.write(plan, tokens, block_tables, new_rows)):
            return self._start(plan, tokens, block_tables, new_rows)

    def follow(self, head: dict[str, Any], arrays: Arrays) -> InFlight:
        """Starts the step of another host's message, which every host must do in the same order."""
        plan, new_rows = self._mirror.read(head, arrays)
        for new in new_rows:
            self._sampling.floats[new.row], self._sampling.ints[new.row] = new.floats, new.ints
        return self._start(plan, self._mirror.tokens, self._mirror.block_tables, new_rows)

    def _start(self, plan: StepPlan, tokens: Ints, block_tables: Ints, new_rows: Sequence[NewRow]) -> InFlight:
        self._write_rows(new_rows)
        num_samples = len(plan.sample_rows)
        num_rows = max(len(plan.rows), num_samples)
        bucket = find_bucket(self.buckets, plan.num_tokens, num_rows, plan.num_decode == len(plan.rows) and not plan.scored)
        inputs = pack(plan, tokens, block_tables, self._sampling, bucket, self._rules)
        step = self._compiled_step(bucket)
        if plan.num_tokens > SHORT_STEP or num_rows > FEW_ROWS:
            self._use_large_pages()
        if self._swap is not None:
            self._pages = self._swap.apply(self._pages, plan.swap_outs, plan.swap_ins)
        self._pages, self._tokens, sampled = step(self._params, self._pages, self._tokens, inputs)
        prompt, sampled = sampled.prompt, replace(sampled, prompt=None)
        wants_logprobs = any(request.params.needs_logprobs for request in plan.sampled)
        num_scored = sum(end - start for _, start, end in plan.scored)
        for array in jax.tree.leaves((sampled if wants_logprobs else sampled.tokens, prompt if num_scored else None)):
            array.copy_to_host_async()
        return InFlight(sampled, prompt, num_samples, wants_logprobs, num_scored)

    def _new_row(self, request: Any) -> NewRow | None:
        """Parameters, rules and earlier tokens of a request that is new in its row; None when it is not."""
        params, row = request.params, request.row
        temperature = 1.0 if request.beam is None else request.beam.temperature
        flags = flags_of(request.rules, [self._processors[name] for name in params.logits_processors or ()])
        turn, length = request.metrics.num_preemptions, len(request.prompt_token_ids)
        table = self._sampling
        has_stops = request.rules is not None and bool(request.rules.stops)
        if not table.set(row, request, params, request.seed, temperature, turn=turn, prompt_len=length, flags=flags, has_stops=has_stops):
            return None
        known = np.array(request.tokens_between(0, request.num_tokens), np.int32) if params.needs_history else None
        return NewRow(row, table.floats[row].copy(), table.ints[row].copy(), request.rules, known)

    def _write_rows(self, new_rows: Sequence[NewRow]) -> None:
        """Rules and earlier tokens, on the device."""
        for new in new_rows:
            row = np.int32(new.row)
            if new.rules is not None:
                self._rules = write_row(self._rules, row, as_row(new.rules, self._vocab_size))
            if new.known is not None:
                known = np.full(self.config.max_model_len, -1, np.int32)
                known[: len(new.known)] = new.known
                self._tokens = write_tokens(self._tokens, row, known)

    def fetch(self, step: InFlight) -> StepResult:
        """Waits for a step's tokens. An exception of the device comes here."""
        tokens = np.asarray(step.sampled.tokens)[: step.num_samples]
        prompt = jax.tree.map(lambda array: np.asarray(array)[: step.num_scored], step.prompt) if step.num_scored else None
        if not step.wants_logprobs:
            return StepResult(tokens, prompt=prompt)
        host = jax.tree.map(lambda array: np.asarray(array)[: step.num_samples], step.sampled)
        return StepResult(tokens, host.logprobs, host.ranks, host.top_tokens, host.top_logprobs, prompt)

    def restore_pages(self) -> bool:
        """Waits for what is in flight, and makes a new pool if a failed step has taken the old one with it; True if it did.

        Then nothing that was written is left.
        """
        if self._swap is not None:
            self._swap.forget()
        try:
            jax.block_until_ready((self._pages, self._tokens))
        except RuntimeError:
            self._pages, self._tokens = self._new_pool(), self._new_tokens()
            return True
        return False

    def _new_pool(self) -> jax.Array:
        struct = self._pool_struct
        self._has_large_pages = False
        make = jax.jit(lambda: new_pool(struct.shape, struct.dtype), out_shardings=self._pool_format)
        pool: jax.Array = self._executables.get("pool", lambda: make.lower().compile())()
        return pool

    def _use_large_pages(self) -> None:
        if not self._has_large_pages:
            use_large_pages(self._pages)
            self._has_large_pages = True

    def _new_tokens(self) -> jax.Array:
        # Committed, as it comes back from a step: else writing its rows would be compiled twice.
        return zeros(self._tokens_struct.shape, jnp.int32, self._input_sharding or SingleDeviceSharding(jax.local_devices()[0]))

    def warmup(self, buckets: Iterable[Bucket] | None = None, *, progress: bool = True) -> None:
        """Compiles the steps of `buckets` (all by default), two at a time, with a progress bar; a CPU's pool gets its memory meanwhile."""
        self._use_large_pages()
        with touching(self._pages):
            self._compile_all(buckets, progress)

    def _compile_all(self, buckets: Iterable[Bucket] | None, progress: bool) -> None:
        row = np.int32(0)
        self._rules = write_row(self._rules, row, as_row(LogitRules(), self._vocab_size))
        self._tokens = write_tokens(self._tokens, row, np.full(self.config.max_model_len, -1, np.int32))
        wanted = [bucket for bucket in (self.buckets if buckets is None else buckets) if bucket not in self._compiled]
        for bucket in wanted:
            self.prefetch(bucket)
        if self._swap is not None:
            self._swap.prefetch(self._pool)
        with tqdm(wanted, desc="Compiling steps", unit="bucket", leave=False, disable=None if progress else True) as bar:
            for bucket in bar:
                bar.set_postfix_str(f"{bucket.num_tokens} tokens in {bucket.num_rows} rows{', decode' if bucket.decode_only else ''}")
                self._compiled_step(bucket)
        if self._swap is not None:
            self._swap.warmup()

    def measure_swap(self) -> tuple[int, float] | None:
        """A number of pages and the seconds that copying so many one way takes; None without host memory for them."""
        if self._swap is None:
            return None
        self._pages, count, seconds = self._swap.measure(self._pages)
        return count, seconds

    @property
    def is_compiling(self) -> bool:
        """Whether a step is being compiled in the background."""
        return any(not future.done() for future in self._pending.values())

    def prefetch(self, bucket: Bucket, *, in_turn: bool = False) -> None:
        """Starts compiling a bucket's step in the background; `in_turn`: when those before it are done."""
        if bucket not in self._compiled and bucket not in self._pending:
            earlier = list(self._pending.values()) if in_turn else []
            self._pending[bucket] = self._pool.submit(self._compile_in_turn, bucket, earlier)

    def prefetch_for(self, num_tokens: int, num_rows: int, *, decode_only: bool) -> None:
        """Starts compiling the step that a plan of this size would take; on few cores after those that are needed before it."""
        bucket = find_bucket(self.buckets, num_tokens, num_rows, decode_only)
        with nullcontext() if self.announce is None else self.announce(encode(COMPILE, asdict(bucket))):
            self.prefetch(bucket, in_turn=num_cpus() <= FEW_CORES)

    def _compiled_step(self, bucket: Bucket) -> Any:
        if bucket not in self._compiled:
            self.prefetch(bucket)
            self._compiled[bucket] = self._pending.pop(bucket).result()
            self._num_steps_compiled += 1
            if self.on_compiled is not None:
                self.on_compiled()
        return self._compiled[bucket]

    def _compile_in_turn(self, bucket: Bucket, earlier: Sequence[Future[Any]]) -> Any:
        wait(earlier)  # they are running: this thread had to take them first
        if self._is_closed:
            raise CancelledError
        return self._compile(bucket)

    def _compile(self, bucket: Bucket) -> Any:
        started = time.perf_counter()
        compiled = self._executables.get(bucket.name, partial(self._lower_and_compile, bucket))
        log.debug("compiled %s in %.1f s", bucket, time.perf_counter() - started)
        return compiled

    def _lower_and_compile(self, bucket: Bucket) -> Any:
        width = -(-self.config.max_model_len // self.config.page_size)
        inputs = input_struct(bucket, width, max_num_seqs=self.config.max_num_seqs, vocab_size=self._vocab_size)
        if self._input_sharding is not None:
            inputs = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=self._input_sharding), inputs)
        step = jit_step(self._step, self._pool_format, bucket.name)
        return step.lower(self._abstract_params, self._pool_struct, self._tokens_struct, inputs).compile()

    def compiled_texts(self) -> dict[str, str]:
        """The HLO of the compiled steps by the names of their buckets."""
        return {bucket.name: step.as_text() for bucket, step in self._compiled.items()}

    def close(self) -> None:
        """Stops the compiling threads; what they have not begun is dropped."""
        self._is_closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
