"""Holds parameters, pages and compiled programs; runs plans on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from pjax.errors import ConfigError
from pjax.hosts.codec import Arrays, encode
from pjax.kv_cache.layout import KVCacheLayout
from pjax.machine import num_cpus
from pjax.models import ModelSource
from pjax.models.sharding import MODEL_AXIS
from pjax.pallas_kernels.pages import new_pool, pool_format, pool_shape, touching, use_large_pages
from pjax.params import MAX_CANDIDATES
from pjax.runner.batch import (
    BlocksShape,
    Bucket,
    Ints,
    SampleShape,
    ScoreShape,
    WriteShape,
    find_bucket,
    forward_input_struct,
    make_buckets,
    pack,
)
from pjax.runner.executables import Executables
from pjax.runner.forward import (
    LOGITS_SPEC,
    POOL_SPEC,
    jit_forward,
    jit_score,
    make_forward,
    make_score,
    make_write_blocks,
    shard_forward,
    shard_score,
)
from pjax.runner.mirror import COMPILE, Mirror, NewRow
from pjax.runner.page_copies import PageSwap
from pjax.runner.programs import Programs, Shape
from pjax.sampling.adjust import LogitsProcessor
from pjax.sampling.parameters import SamplingTable, flags_of
from pjax.sampling.processors import check_processors
from pjax.sampling.program import jit_sample, sample_input_struct
from pjax.sampling.prompt_logprobs import PromptScores, scored_struct
from pjax.sampling.sampler import ROWS, Sampled
from pjax.sampling.token_rules import as_row, empty_tables, tables_struct, write_row, write_tokens, zeros
from pjax.sampling.vocabulary import WHOLE, Vocabulary
from pjax.scheduler.plan import StepPlan

Floats = npt.NDArray[np.float32]
SHORT_STEP, FEW_ROWS = 64, 8  # tokens and rows of steps that go without large pages for the pool, unless all was warmed up
WRITE_RULES, WRITE_TOKENS = WriteShape("write_rules"), WriteShape("write_tokens")
BLOCK_SIZES = (32, 512, 8192)  # cells of the block tables that one program writes: what a decode step changes, a prompt, a long prefix
FEW_CORES = 2  # that one compilation keeps busy: the step that is needed first has them to itself


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """Sizes that the device side needs; all checked by the engine."""

    num_pages: int  # of one layer
    layout: KVCacheLayout  # of one device's share of the model
    page_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_dtype: str
    attention_backend: str | None = None
    num_host_slots: int = 0  # pages of preempted requests in host memory
    logits_processors: Mapping[str, LogitsProcessor] = field(default_factory=dict)
    step_folder: Path | None = None  # where compiled programs are kept


@dataclass(frozen=True, slots=True)
class StepResult:
    """On the host, by `plan.sampled`: its token and, if any of them asked, its log-probabilities."""

    tokens: Ints
    logprobs: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    ranks: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    top_tokens: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    top_logprobs: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    prompt: PromptScores | None = None
    """Scores of the tokens of `plan.scored`, one after the other; None when there are none."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step that was dispatched."""

    logits: jax.Array
    sampled: Sampled | None  # None where no row is sampled
    prompt: PromptScores | None  # None where no prompt token is scored
    num_samples: int
    wants_logprobs: bool
    num_scored: int

    @property
    def has_ended(self) -> bool:
        """Whether `wait` would return at once."""
        return all(array.is_ready() for array in jax.tree.leaves(self._last))

    def wait(self) -> None:
        """Until it has ended. An exception of the device comes here."""
        jax.block_until_ready(self._last)

    @property
    def _last(self) -> Any:
        return self.logits if self.sampled is None else self.sampled.tokens, self.prompt


class ModelRunner:
    """Runs plans on the device. A step is a forward program and a sample program, dispatched one after the other.

    `programs` has them by shape; a missing one is compiled when it is needed. `num_compilations` counts them, and the copies between
    pages and host memory; after `warmup()` it does not change.
    """

    def __init__(self, model: ModelSource, config: RunnerConfig) -> None:
        self.config = config
        self.buckets = make_buckets(config.max_num_seqs, config.max_num_batched_tokens)
        self._abstract_params, self._structure = jax.tree.flatten(model.abstract)
        self._params: list[jax.Array] | None = None
        c, shares = model.own_config, model.shares
        pool_sharding: Sharding = SingleDeviceSharding(jax.local_devices()[0])
        # Committed, as it comes back from a step: else writing its rows would be compiled twice.
        self._tokens_sharding = pool_sharding
        self._input_sharding: Sharding | None = None
        if shares is not None:
            pool_sharding = NamedSharding(shares.mesh, POOL_SPEC)
            self._input_sharding = self._tokens_sharding = NamedSharding(shares.mesh, PartitionSpec())
        layout = config.layout
        num_heads = layout.num_kv_heads * (1 if shares is None else shares.size)
        shape = pool_shape(layout.num_layers, config.num_pages, config.page_size, num_heads, layout.head_size)
        self._pool_format = pool_format(pool_sharding)
        self._pool_struct = jax.ShapeDtypeStruct(shape, config.kv_cache_dtype, sharding=self._pool_format)
        tokens_shape = (config.max_num_seqs, config.max_model_len)
        self._tokens_struct = jax.ShapeDtypeStruct(tokens_shape, jnp.int32, sharding=self._tokens_sharding)
        tables_shape = (len(layout.groups), config.max_num_seqs, -(-config.max_model_len // config.page_size))
        self._tables_struct = jax.ShapeDtypeStruct(tables_shape, jnp.int32, sharding=self._tokens_sharding)
        self._vocab_size, self._shares = model.config.vocab_size, shares
        self._vocabulary = WHOLE if shares is None else Vocabulary(MODEL_AXIS, self._vocab_size)
        forward = make_forward(model.graph, self._structure, layout, config.attention_backend)
        score = make_score(model.graph, self._structure, self._vocabulary)
        self._forward = forward if shares is None else shard_forward(forward, shares)
        self._score = score if shares is None else shard_score(score, shares)
        self._logits_width = c.vocab_size * (1 if shares is None else shares.size)  # padded to equal shares
        facts = (model.graph, self._abstract_params, c, replace(config, num_host_slots=0, logits_processors={}, step_folder=None))
        self._executables = Executables(config.step_folder, *facts)
        # Sampling follows from nothing else of the model: other models find the same programs.
        self._sample_executables = Executables(config.step_folder, self._vocab_size, tokens_shape, tables_shape)
        self._has_large_pages = False
        try:
            self._pages, self._tokens, self._block_tables = self._new_pool(), self._new_tokens(), self._new_tables()
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error) and "memory" not in str(error).lower():
                raise
            size = config.num_pages * layout.page_bytes(config.page_size, jnp.dtype(config.kv_cache_dtype).itemsize)
            raise ConfigError(f"the page pool of {size / 2**30:.2f} GiB does not fit the device: {error}") from error
        self._swap = (
            PageSwap(config.num_host_slots, layout.num_layers, self._pool_struct, self._pool_format) if config.num_host_slots else None
        )
        self._sampling = SamplingTable(config.max_num_seqs)
        self._rules = empty_tables(config.max_num_seqs, self._vocab_size, self._input_sharding)
        processors = config.logits_processors
        check_processors(processors, [min(bucket.num_rows, ROWS) for bucket in self.buckets], config.max_model_len, self._vocab_size)
        self._processors = {name: index for index, name in enumerate(processors)}
        self.programs = Programs(self._compile)
        self._mirror = Mirror(config.max_num_seqs, config.max_model_len)
        self.announce: Callable[[bytes], AbstractContextManager[None]] | None = None
        """Called with each step's message; inside of what it gives the step is dispatched. Other hosts run it too, by `follow`."""

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far; none after `warmup()`."""
        return self.programs.num_compilations + (self._swap.num_compilations if self._swap is not None else 0)

    def set_params(self, params: Any) -> None:
        """Gives the weights, a state as `ModelSource.load` returns it; compilation may begin before."""
        self._params = jax.tree.leaves(params)

    @property
    def params(self) -> list[jax.Array]:
        """The weights, flat."""
        assert self._params is not None, "weights are given before anything runs"
        return self._params

    def dispatch(self, plan: StepPlan, tokens: Ints) -> InFlight:
        """Starts a step and does not wait for it. Steps run one after the other, in the order of their dispatch.

        Args:
          tokens: int32 [rows, max_model_len], the scheduler's table. It may change as soon as this returns.
        """
        new_rows = [made for request in plan.sampled if (made := self._new_row(request)) is not None]
        if self.announce is None:
            return self._start(plan, tokens, new_rows)
        with self.announce(self._mirror.write(plan, tokens, new_rows)):
            return self._start(plan, tokens, new_rows)

    def follow(self, head: dict[str, Any], arrays: Arrays) -> InFlight:
        """Starts the step of another host's message, which every host must do in the same order."""
        plan, new_rows = self._mirror.read(head, arrays)
        for new in new_rows:
            self._sampling.floats[new.row], self._sampling.ints[new.row] = new.floats, new.ints
        return self._start(plan, self._mirror.tokens, new_rows)

    def _start(self, plan: StepPlan, tokens: Ints, new_rows: Sequence[NewRow]) -> InFlight:
        self._write_rows(new_rows)
        self._write_blocks(plan.blocks)
        num_samples = len(plan.sample_rows)
        num_rows = max(len(plan.rows), num_samples)
        bucket = self._bucket_for(plan, num_rows)
        inputs = pack(plan, tokens, self._sampling, bucket, self._rules, len(self.config.layout.groups))
        if num_samples:
            self.prefetch(bucket)  # both at once, where they are missing
        forward = self.programs.get(bucket)
        sample = self.programs.get(SampleShape(bucket.num_rows)) if num_samples else None
        score = self.programs.get(ScoreShape(bucket.num_tokens)) if inputs.scored is not None else None
        if plan.num_tokens > SHORT_STEP or num_rows > FEW_ROWS:
            self._use_large_pages()
        if self._swap is not None:
            self.programs.is_waiting = not self._swap.is_compiled  # this may compile
            try:
                self._pages = self._swap.apply(self._pages, plan.swap_outs, plan.swap_ins)
            finally:
                self.programs.is_waiting = False
        self._pages, logits, hidden = forward(self._params, self._pages, self._block_tables, self._tokens, inputs.forward)
        sampled = prompt = None
        if sample is not None:
            self._tokens, sampled = sample(logits, self._tokens, inputs.sample)
        if score is not None:
            prompt = score(self._params, hidden, inputs.scored)
        wants_logprobs = any(request.params.needs_logprobs for request in plan.sampled)
        num_scored = sum(end - start for _, start, end in plan.scored)
        tokens_alone = None if sampled is None else sampled.tokens
        for array in jax.tree.leaves((sampled if wants_logprobs else tokens_alone, prompt)):
            array.copy_to_host_async()
        return InFlight(logits, sampled, prompt, num_samples, wants_logprobs, num_scored)

    def _bucket_for(self, plan: StepPlan, num_rows: int) -> Bucket:
        """The smallest bucket that holds a plan; while programs are compiled in the background, the smallest that is there already."""
        decode_only = plan.num_decode == len(plan.rows) and not plan.scored
        best = find_bucket(self.buckets, plan.num_tokens, num_rows, decode_only)
        if not self.programs.is_warming or self.programs.has(best, SampleShape(best.num_rows)):
            return best
        self.programs.hurry(best, SampleShape(best.num_rows))
        for bucket in self.buckets:  # in the order of their sizes, those of decode rows first
            is_large_enough = bucket.num_tokens >= plan.num_tokens and bucket.num_rows >= num_rows
            if is_large_enough and bucket.decode_only <= decode_only and self.programs.has(bucket, SampleShape(bucket.num_rows)):
                return bucket
        return best

    def _new_row(self, request: Any) -> NewRow | None:
        """Parameters, rules and earlier tokens of a request that is new in its row; None when it is not."""
        params, row = request.params, request.row
        temperature = 1.0 if request.beam is None else request.beam.temperature
        flags = flags_of(request.rules, [self._processors[name] for name in params.logits_processors or ()])
        table = self._sampling
        more: dict[str, Any] = {
            "num_preemptions": request.metrics.num_preemptions,
            "prompt_len": len(request.prompt_token_ids),
            "flags": flags,
            "has_stops": request.rules is not None and bool(request.rules.stops),
        }
        if not table.set(row, request, params, request.seed, temperature, **more):
            return None
        known = np.array(request.tokens_between(0, request.num_tokens), np.int32) if params.needs_history else None
        return NewRow(row, table.floats[row].copy(), table.ints[row].copy(), request.rules, known)

    def _write_rows(self, new_rows: Sequence[NewRow]) -> None:
        """Rules and earlier tokens, on the device."""
        for new in new_rows:
            row = np.int32(new.row)
            if new.rules is not None:
                self._rules = self.programs.get(WRITE_RULES)(self._rules, row, as_row(new.rules, self._vocab_size))
            if new.known is not None:
                known = np.full(self.config.max_model_len, -1, np.int32)
                known[: len(new.known)] = new.known
                self._tokens = self.programs.get(WRITE_TOKENS)(self._tokens, row, known)

    def _write_blocks(self, changes: Ints) -> None:
        """Cells of the block tables, on the device: what a plan has changed, not the tables of its rows."""
        while len(changes):
            size = next((size for size in BLOCK_SIZES if size >= len(changes)), BLOCK_SIZES[-1])
            padded = np.full((size, 2), math.prod(self._tables_struct.shape), np.int32)
            padded[: len(changes)] = changes[:size]
            self._block_tables = self.programs.get(BlocksShape(size))(self._block_tables, padded)
            changes = changes[size:]

    def fetch(self, step: InFlight) -> StepResult:
        """Waits for a step's tokens. An exception of the device comes here."""
        step.wait()
        prompt = None if step.prompt is None else jax.tree.map(lambda array: np.asarray(array)[: step.num_scored], step.prompt)
        if step.sampled is None:
            return StepResult(np.zeros(0, np.int32), prompt=prompt)
        if not step.wants_logprobs:
            return StepResult(np.asarray(step.sampled.tokens)[: step.num_samples], prompt=prompt)
        host = jax.tree.map(lambda array: np.asarray(array)[: step.num_samples], step.sampled)
        return StepResult(host.tokens, host.logprobs, host.ranks, host.top_tokens, host.top_logprobs, prompt)

    def restore_pages(self) -> bool:
        """Waits for what is in flight, and makes a new pool if a failed step has taken the old one with it; True if it did.

        Then nothing that was written is left.
        """
        if self._swap is not None:
            self._swap.forget()
        try:
            jax.block_until_ready((self._pages, self._tokens, self._block_tables))
        except RuntimeError:
            self._pages, self._tokens, self._block_tables = self._new_pool(), self._new_tokens(), self._new_tables()
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
        return zeros(self._tokens_struct.shape, jnp.int32, self._tokens_sharding)

    def _new_tables(self) -> jax.Array:
        return zeros(self._tables_struct.shape, jnp.int32, self._tokens_sharding)

    def warmup(self, buckets: Iterable[Bucket] | None = None, *, progress: bool = True) -> None:
        """Compiles the programs of `buckets` (all by default) with a progress bar; a CPU's pool gets its memory meanwhile."""
        self._use_large_pages()
        with touching(self._pages):
            if self._swap is not None:
                self._swap.prefetch(self.programs.threads)
            self.programs.warmup(self._shapes(self.buckets if buckets is None else buckets), progress=progress)
            if self._swap is not None:
                self._swap.warmup()

    def warm_in_background(self) -> None:
        """Starts compiling all programs in a thread of low priority; steps run meanwhile.

        First comes what holds any plan, the largest bucket, so that there is always something to borrow; then what a single request
        takes, and so on by size.
        """
        by_size = sorted(self.buckets, key=lambda bucket: (bucket.num_tokens, not bucket.decode_only))
        steps = [shape for bucket in (self.buckets[-1], *by_size) for shape in (bucket, SampleShape(bucket.num_rows))]
        shapes = dict.fromkeys([*steps, *self._shapes(self.buckets)])
        self.programs.warm_in_background(shapes, None if self._swap is None else self._swap.warmup)

    def _shapes(self, buckets: Iterable[Bucket]) -> list[Shape]:
        """Shapes of all programs that steps of these buckets can take."""
        buckets = list(buckets)
        samples = dict.fromkeys(SampleShape(bucket.num_rows) for bucket in buckets)
        scores = (ScoreShape(bucket.num_tokens) for bucket in buckets if not bucket.decode_only)
        return [*buckets, *samples, *map(BlocksShape, BLOCK_SIZES), WRITE_RULES, WRITE_TOKENS, *scores]

    def measure_swap(self) -> tuple[int, float] | None:
        """A number of pages and the seconds that copying so many one way takes; None without host memory for them."""
        if self._swap is None:
            return None
        self._pages, count, seconds = self._swap.measure(self._pages)
        return count, seconds

    def prefetch(self, bucket: Bucket, *, in_turn: bool = False) -> None:
        """Starts compiling what a bucket's steps need, in the background; `in_turn`: when what is being compiled now is done."""
        self.programs.prefetch(bucket, SampleShape(bucket.num_rows), in_turn=in_turn)

    def prefetch_for(self, num_tokens: int, num_rows: int, *, decode_only: bool) -> None:
        """Starts compiling what a plan of this size would take; on few cores after what is needed before it."""
        bucket = find_bucket(self.buckets, num_tokens, num_rows, decode_only)
        if self.programs.has(bucket, SampleShape(bucket.num_rows)):
            return
        if decode_only and self.programs.is_warming:  # the bucket of the prompt's step can serve until this one is there
            self.programs.hurry(bucket, SampleShape(bucket.num_rows))
            return
        with nullcontext() if self.announce is None else self.announce(encode(COMPILE, asdict(bucket))):
            self.prefetch(bucket, in_turn=num_cpus() <= FEW_CORES)

    def _compile(self, shape: Shape) -> Any:
        """From disk, or compiled. Any thread may call it."""
        executables = self._executables if isinstance(shape, Bucket | ScoreShape) else self._sample_executables
        return executables.get(shape.name, partial(self._lower_and_compile, shape))

    def _lower_and_compile(self, shape: Shape) -> Any:
        if isinstance(shape, Bucket):
            return self._lower_forward(shape).compile()
        if isinstance(shape, SampleShape):
            return self._lower_sample(shape).compile()
        if isinstance(shape, BlocksShape):
            changes = self._placed(jax.ShapeDtypeStruct((shape.num_cells, 2), jnp.int32))
            return make_write_blocks(shape.num_cells).lower(self._tables_struct, changes).compile()
        return (self._lower_score(shape) if isinstance(shape, ScoreShape) else self._lower_write(shape)).compile()

    def _lower_forward(self, bucket: Bucket) -> Any:
        return jit_forward(self._forward, self._pool_format, bucket.name).lower(*self._forward_structs(bucket))

    def _forward_structs(self, bucket: Bucket) -> tuple[Any, ...]:
        inputs = self._placed(forward_input_struct(bucket, len(self.config.layout.groups)))
        return self._abstract_params, self._pool_struct, self._tables_struct, self._tokens_struct, inputs

    def _lower_sample(self, shape: SampleShape) -> Any:
        shares, most = self._shares, min(MAX_CANDIDATES, self._vocab_size)
        mesh = None if shares is None else shares.mesh
        program = jit_sample(shape.name, most, self._vocabulary, tuple(self.config.logits_processors.values()), mesh)
        sharding = None if shares is None else NamedSharding(shares.mesh, LOGITS_SPEC)
        logits = jax.ShapeDtypeStruct((shape.num_rows, self._logits_width), jnp.float32, sharding=sharding)
        inputs = sample_input_struct(shape.num_rows, max_num_seqs=self.config.max_num_seqs, vocab_size=self._vocab_size)
        return program.lower(logits, self._tokens_struct, self._placed(inputs))

    def _lower_score(self, shape: ScoreShape) -> Any:
        hidden = jax.ShapeDtypeStruct((shape.num_tokens, self._hidden.shape[1]), self._hidden.dtype)
        inputs = self._placed((hidden, scored_struct(shape.num_tokens)))
        return jit_score(self._score, shape.name).lower(self._abstract_params, *inputs)

    def _lower_write(self, shape: WriteShape) -> Any:
        row = jax.ShapeDtypeStruct((), jnp.int32)
        if shape == WRITE_TOKENS:
            known = jax.ShapeDtypeStruct((self.config.max_model_len,), jnp.int32)
            return write_tokens.lower(self._tokens_struct, *self._placed((row, known)))
        tables = tables_struct(self.config.max_num_seqs, self._vocab_size)
        one = jax.tree.map(lambda table: jax.ShapeDtypeStruct(table.shape[1:], table.dtype), tables)
        return write_row.lower(*self._placed((tables, row, one)))

    @cached_property
    def _hidden(self) -> Any:
        """Type and size of hidden states."""
        smallest = next(bucket for bucket in self.buckets if not bucket.decode_only)
        return jax.eval_shape(self._forward, *self._forward_structs(smallest))[2]

    def _placed(self, structs: Any) -> Any:
        """The same on every device of a mesh."""
        if self._input_sharding is None:
            return structs
        return jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=self._input_sharding), structs)

    def compiled_texts(self) -> dict[str, str]:
        """The HLO of the compiled programs by their names."""
        return self.programs.texts()

    def close(self) -> None:
        """Stops the compiling threads; what they have not begun is dropped."""
        self.programs.close()
