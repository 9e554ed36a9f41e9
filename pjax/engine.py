"""The engine: scheduler + runner + text. A step is schedule, execute, commit."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjax.config import EngineConfig
from pjax.errors import ConfigError, InvalidRequestError
from pjax.memory import choose_num_pages, describe_pool
from pjax.models import open_model
from pjax.models.given import match, source_of
from pjax.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from pjax.params import MAX_CANDIDATES, MAX_SEED, BeamSearchParams, SamplingParams
from pjax.runner import ModelRunner, RunnerConfig, StepResult, use_compilation_cache
from pjax.scheduler import Request, Scheduler
from pjax.scheduler.beam import BeamSearch, num_candidates
from pjax.text.detokenizer import Detokenizer
from pjax.text.loading import load_tokenizer
from pjax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Prompt = str | Sequence[int]


@dataclass(eq=False, slots=True)
class _Sequence:
    """One sequence as its caller sees it: its text and log-probabilities so far."""

    request: Request
    detokenizer: Detokenizer | None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    text: str = ""


@dataclass(eq=False, slots=True)
class _Group:
    """The sequences of one prompt."""

    prompt: str | None
    sequences: list[_Sequence]


class LLMEngine:
    """Serves requests step by step.

    `add_request` accepts or refuses one at once; each `step` computes tokens for all that run and returns the outputs
    that changed. Not thread-safe.
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
    ) -> None:
        self.config = config = config or EngineConfig()
        use_compilation_cache(config.compilation_cache_dir)
        platform = jax.default_backend()
        layer_mode = ("loop" if platform == "cpu" else "unroll") if config.layer_mode == "auto" else config.layer_mode
        if isinstance(model, str | Path):
            source = open_model(model, dtype=_resolve_dtype(config.dtype, platform), layer_mode=layer_mode)
        else:
            source = source_of(model)
            for name, asked, own in (("dtype", config.dtype, source.dtype), ("layer_mode", config.layer_mode, model.blocks.mode)):
                if asked not in ("auto", own):
                    raise ConfigError(f"{name} is {asked!r}, but the model that was given has {own!r}")
            layer_mode = model.blocks.mode
            if tokenizer is None and not skip_tokenizer_init:
                raise ConfigError("model is a module, which has no tokenizer: give tokenizer= a path, or set skip_tokenizer_init")
        self._abstract = source.abstract
        given = None if params is None else match(source.abstract, params)
        self.tokenizer: Tokenizer | None = None if skip_tokenizer_init else load_tokenizer(Path(tokenizer or source.path))
        self.model_config = source.config
        self.max_model_len = self._resolve_length(source.config.max_position)
        self._eos = frozenset(source.eos_token_ids) | frozenset(self.tokenizer.eos_token_ids if self.tokenizer else ())
        kv_dtype = "float32" if platform == "cpu" else jnp.dtype(source.dtype).name
        num_pages = choose_num_pages(config, source.config, kv_dtype, self.max_model_len, weight_bytes=source.num_bytes)
        log.info("%s: %.2f GiB of %s weights, layers by %s", source.path.name, source.num_bytes / 2**30, source.dtype, layer_mode)
        log.info("%s", describe_pool(num_pages, config.page_size, self.max_model_len))
        limits: dict[str, int] = {
            "num_pages": num_pages,
            "page_size": config.page_size,
            "max_model_len": self.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
        }
        self.scheduler = Scheduler(**limits, enable_prefix_caching=config.enable_prefix_caching)
        self.runner = ModelRunner(source, RunnerConfig(**limits, kv_cache_dtype=kv_dtype, attention_backend=config.attention_backend))
        self._groups: dict[str, _Group] = {}
        self._names = itertools.count()
        self._numbers = itertools.count()
        self._loading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pjax-load")
        load = partial(source.load, progress=progress) if given is None else lambda: given
        self._weights: Future[Any] | None = self._loading.submit(load)
        if not config.lazy:
            self.runner.warmup(progress=progress)
            self._wait_for_weights()

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
        given = match(self._abstract, params)
        self._wait_for_weights()
        self.runner.set_params(given)
        if restart:
            self.scheduler.preempt_all()
        self.scheduler.kv.forget()

    def prefetch(self) -> None:
        """Starts compiling, in the background, the steps that the waiting requests will need first. For lazy engines."""
        lengths = self.scheduler.waiting_lengths()
        budget, total = self.config.max_num_batched_tokens, sum(lengths)
        rows = min(self.scheduler.num_waiting_sequences, self.config.max_num_seqs)
        chunks = {budget, total % budget} if total > budget else {total}
        if any(length > 1 for length in lengths):
            for chunk in sorted(chunks - {0}):
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
    ) -> str:
        """Queues a prompt (text or token ids) and returns its id.

        Its cached pages are shared only with requests of the same `cache_salt`: whoever can't guess another's salt can't learn
        from the time to the first token what the other asked.

        Raises InvalidRequestError at once when the request is wrong or can never fit; nothing else is affected.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams | BeamSearchParams):
            raise InvalidRequestError(f"params is {type(params).__name__}, but must be SamplingParams or BeamSearchParams")
        request_id = self._free_id() if request_id is None else request_id
        text = prompt if isinstance(prompt, str) else None
        ids = self._prompt_ids(prompt, request_id)
        self._check_salt(cache_salt, request_id)
        eos = frozenset[int]() if params.ignore_eos else self._eos
        room = max(self.max_model_len - len(ids), 0)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, max(room, 1))
        search = None
        if isinstance(params, BeamSearchParams):
            self._check_beams(params, len(eos), request_id)
            search = BeamSearch(params, max_tokens, eos)
            # Beams are chosen by the likeliest tokens' log-probabilities; nothing else of a step is read.
            params = SamplingParams(n=1, temperature=0, max_tokens=max_tokens, logprobs=0, detokenize=False)
        self._check_sampling(params, request_id)
        common: dict[str, Any] = {
            "request_id": request_id,
            "prompt_token_ids": ids,
            "params": params,
            "max_tokens": max_tokens,
            "stop_token_ids": frozenset(params.stop_token_ids or ()),
            "eos_token_ids": eos,
            "metrics": RequestMetrics(arrival_time=time.monotonic()),
            "cache_salt": cache_salt,
            "beam": search,
        }
        requests = [Request(**common, index=index, seed=0) for index in range(search.width if search else params.n)]
        self.scheduler.add(*requests)
        self._groups[request_id] = _Group(text, [_Sequence(request, self._detokenizer(ids, params)) for request in requests])
        # Only an accepted request takes a number: a refused one must not change the others' draws.
        if search is None:
            seed = self._next_seed() if params.seed is None else params.seed
            for request in requests:
                request.seed = (seed + request.index) & MAX_SEED
        return request_id

    def _check_salt(self, cache_salt: str | None, request_id: str) -> None:
        if cache_salt is not None and (not isinstance(cache_salt, str) or not cache_salt):
            raise InvalidRequestError(f"cache_salt is {cache_salt!r}, but must be a non-empty string (request {request_id!r})")

    def _check_sampling(self, params: SamplingParams, request_id: str) -> None:
        if params.stops and self.tokenizer is None:
            raise InvalidRequestError(f"stop strings need a tokenizer, but skip_tokenizer_init is set (request {request_id!r})")
        self._check_ids(params.stop_token_ids or (), "stop_token_ids", request_id)
        if params.logprobs is not None and params.logprobs > self.model_config.vocab_size:
            raise InvalidRequestError(f"logprobs is {params.logprobs}, but the vocabulary has {self.model_config.vocab_size} tokens")

    def _check_beams(self, params: BeamSearchParams, num_eos: int, request_id: str) -> None:
        each = num_candidates(1, num_eos)
        limit = min(min(MAX_CANDIDATES, self.model_config.vocab_size) // each, self.config.max_num_seqs)
        if params.beam_width > limit:
            raise InvalidRequestError(
                f"beam_width is {params.beam_width}, but must be <= {limit}: {each} candidates for each, "
                f"at most {MAX_CANDIDATES} and the vocabulary, and max_num_seqs (request {request_id!r})"
            )

    def _detokenizer(self, prompt_token_ids: list[int], params: SamplingParams) -> Detokenizer | None:
        return Detokenizer(self.tokenizer, prompt_token_ids, params) if self.tokenizer and params.detokenize else None

    def _free_id(self) -> str:
        return next(name for name in map(str, self._names) if name not in self._groups)

    def _next_seed(self) -> int:
        """Of a request without one: from the engine's seed and how many came before, and no small number that a user might give."""
        text = f"{self.config.seed} {next(self._numbers)}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def _prompt_ids(self, prompt: Prompt, request_id: str) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequestError(f"prompt is text, but skip_tokenizer_init is set: give token ids (request {request_id!r})")
            ids = self.tokenizer.encode(prompt)
            self._check_ids(ids, "prompt", request_id)
            return ids
        if hasattr(prompt, "__array__"):
            prompt = np.asarray(prompt).tolist()
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
            raise InvalidRequestError(f"prompt is {type(prompt).__name__}, but must be text or token ids (request {request_id!r})")
        ids = []
        for index, token in enumerate(prompt):
            if not isinstance(token, int | np.integer) or isinstance(token, bool):
                raise InvalidRequestError(f"prompt has {token!r} at {index}, but must have token ids (request {request_id!r})")
            ids.append(int(token))
        self._check_ids(ids, "prompt", request_id)
        return ids

    def _check_ids(self, ids: Sequence[int], name: str, request_id: str) -> None:
        vocab = self.model_config.vocab_size
        for index, token in enumerate(ids):
            if not 0 <= token < vocab:
                raise InvalidRequestError(
                    f"{name} has token id {token} at {index}, but ids must be in [0, {vocab}) (request {request_id!r})"
                )

    def abort_request(self, request_id: str) -> bool:
        """Ends a request and frees its pages; False when there is none of that id."""
        self._groups.pop(request_id, None)
        return self.scheduler.abort(request_id)

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request is waiting or running."""
        return self.scheduler.has_work

    # ---- the step

    def step(self) -> list[RequestOutput]:
        """Computes one step and returns the requests that got a token, finished ones included."""
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        self._wait_for_weights()
        try:
            result = self.runner.execute(plan, self.scheduler.table.tokens, self.scheduler.table.block_tables)
        except BaseException:  # Ctrl-C too: nothing is lost but time
            self.runner.restore_pages()
            self.scheduler.preempt_all()
            raise
        now = time.monotonic()
        places = {id(request): index for index, request in enumerate(plan.sampled)}
        changed: dict[str, None] = {}  # in the order of the plan
        for request in self.scheduler.commit(plan, result.tokens, now, (result.top_tokens, result.top_logprobs)):
            self._observe(request, result, places[id(request)], now)
            changed[request.request_id] = None
        return [self._output(request_id) for request_id in changed]

    def _observe(self, request: Request, result: StepResult, index: int, now: float) -> None:
        if request.beam is not None:
            request.metrics.finished_time = now
            return
        sequence = self._groups[request.request_id].sequences[request.index]
        if request.params.logprobs is not None:
            self._add_logprobs(sequence, result, index, request.params.logprobs)
        if sequence.detokenizer is not None:
            # As in vLLM: the text of the token that ended it is kept only if asked for.
            hidden = request.finish_reason == "stop" and not request.params.include_stop_str_in_output
            sequence.text += "" if hidden else sequence.detokenizer.append(request.output_token_ids[-1:])
            if sequence.detokenizer.stop_reason is not None:
                stop = sequence.detokenizer.stop_reason
                if request.finish_reason is None:
                    self.scheduler.finish(request, "stop", stop)
                else:
                    request.finish_reason, request.stop_reason = "stop", stop
            elif request.finish_reason is not None:
                sequence.text += sequence.detokenizer.finish()
        if request.finish_reason is not None:
            request.metrics.finished_time = now

    def _add_logprobs(self, sequence: _Sequence, result: StepResult, index: int, count: int) -> None:
        token = int(result.tokens[index])
        entries = {token: (float(result.logprobs[index]), int(result.ranks[index]))}
        for rank in range(count):
            other = int(result.top_tokens[index, rank])
            entries.setdefault(other, (float(result.top_logprobs[index, rank]), rank + 1))
        decode = self.tokenizer.decode if sequence.detokenizer is not None and self.tokenizer else None
        sequence.logprobs.append(
            {t: Logprob(value, rank, decode([t], skip_special_tokens=False) if decode else None) for t, (value, rank) in entries.items()}
        )
        sequence.cumulative_logprob += entries[token][0]

    def _output(self, request_id: str) -> RequestOutput:
        """A request as it is; forgotten when all its sequences have ended."""
        group = self._groups[request_id]
        first = group.sequences[0].request
        finished = all(sequence.request.finish_reason is not None for sequence in group.sequences)
        if finished:
            del self._groups[request_id]
        return RequestOutput(
            request_id=request_id,
            prompt=group.prompt,
            prompt_token_ids=list(first.prompt_token_ids),
            outputs=[_completion(sequence) for sequence in group.sequences] if first.beam is None else self._found(first.beam),
            finished=finished,
            num_cached_tokens=first.num_cached_tokens,
            metrics=replace(first.metrics, finished_time=first.metrics.finished_time if finished else None),
        )

    def _found(self, search: BeamSearch) -> list[CompletionOutput]:
        return [
            CompletionOutput(
                index=index,
                text=self.tokenizer.decode(found.tokens) if self.tokenizer else "",
                token_ids=found.tokens,
                cumulative_logprob=found.cum_logprob,
                finish_reason="stop" if found.ended else "length",
            )
            for index, found in enumerate(search.finished)
        ]

    def close(self) -> None:
        """Stops the engine's threads."""
        self._loading.shutdown(wait=False, cancel_futures=True)
        self.runner.close()


def _resolve_dtype(dtype: str, platform: str) -> str:
    return ("float32" if platform == "cpu" else "auto") if dtype == "auto" else dtype


def _completion(sequence: _Sequence) -> CompletionOutput:
    request = sequence.request
    wants_logprobs = request.params.logprobs is not None
    return CompletionOutput(
        index=request.index,
        text=sequence.text,
        token_ids=list(request.output_token_ids),
        cumulative_logprob=sequence.cumulative_logprob if wants_logprobs else None,
        logprobs=list(sequence.logprobs) if wants_logprobs else None,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
    )
