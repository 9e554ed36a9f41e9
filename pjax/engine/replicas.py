"""Data parallelism for offline batches: several engines in one process, each on devices of its own, behind an engine's methods."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from pjax.config import EngineConfig
from pjax.engine.engine import LLMEngine
from pjax.engine.intake import Prompt
from pjax.errors import ConfigError
from pjax.models.sharding import make_mesh
from pjax.outputs import RequestOutput
from pjax.params import BeamSearchParams, SamplingParams
from pjax.text.tokenizer import Tokenizer


class Replicas:
    """`data_parallel_size` engines, each on the next `tensor_parallel_size` devices, with weights, pages and a prefix cache of its own.

    A request goes to the engine with the fewest tokens to come. `step` asks one engine after the other: with asynchronous
    scheduling, the others' next steps run meanwhile. Requests without a seed get the ones that a single engine would give them.

    Raises ConfigError when there are too few devices, or when a mesh, parameters or a module are given, which are for one engine.
    """

    def __init__(self, model: Any, config: EngineConfig, *, params: Any = None, **options: Any) -> None:
        size, each, devices = config.data_parallel_size, config.tensor_parallel_size, jax.devices()
        for name, given in (
            ("a mesh", config.mesh is not None),
            ("params", params is not None),
            ("a module", not isinstance(model, str | Path)),
        ):
            if given:
                raise ConfigError(f"data_parallel_size is {size}, but {name} was given, which is for one engine")
        if size * each > len(devices):
            raise ConfigError(
                f"data_parallel_size is {size} and tensor_parallel_size is {each}, which takes {size * each} devices, "
                f"but there are {len(devices)} ({devices[0].platform})"
            )
        meshes = [make_mesh(each, devices[start : start + each]) for start in range(0, size * each, each)]
        self.config = config
        self.engines = [LLMEngine(model, replace(config, data_parallel_size=1, mesh=mesh), **options) for mesh in meshes]
        for engine in self.engines[1:]:
            engine.share_intake(self.engines[0])
        self._names = itertools.count()
        self._places: dict[str, tuple[int, int]] = {}  # a request's engine and tokens
        self._tokens = [0] * size  # to come, of each engine

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of all engines."""
        return self.engines[0].tokenizer

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> str:
        """See `LLMEngine.add_request`."""
        options: dict[str, Any] = {"cache_salt": cache_salt, "priority": priority, "timeout": timeout}
        prepared = self.engines[0].prepare(prompt, params, str(next(self._names)), **options)
        index = min(range(len(self.engines)), key=lambda i: self._tokens[i])
        request_id = self.engines[index].submit(prepared)
        tokens = len(prepared.requests[0].prompt_token_ids) + sum(request.max_tokens for request in prepared.requests)
        self._places[request_id] = index, tokens
        self._tokens[index] += tokens
        return request_id

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """See `LLMEngine.abort_request`."""
        index = self._forget(request_id)
        return None if index is None else self.engines[index].abort_request(request_id)

    def _forget(self, request_id: str) -> int | None:
        index, tokens = self._places.pop(request_id, (None, 0))
        if index is not None:
            self._tokens[index] -= tokens
        return index

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any engine has one."""
        return any(engine.has_unfinished_requests for engine in self.engines)

    def step(self) -> list[RequestOutput]:
        """One step of every engine that has requests; see `LLMEngine.step`."""
        outputs = [output for engine in self.engines if engine.has_unfinished_requests for output in engine.step()]
        for output in outputs:
            if output.finished:
                self._forget(output.request_id)
        return outputs

    def prefetch(self) -> None:
        """See `LLMEngine.prefetch`."""
        for engine in self.engines:
            engine.prefetch()

    def update_params(self, params: Any, *, restart: bool = False) -> None:
        """Raises ConfigError: parameters are one engine's. `engines[i].update_params` swaps those of one."""
        raise ConfigError(f"data_parallel_size is {len(self.engines)}, but params was given, which is for one engine")

    def close(self) -> None:
        """Stops the engines' threads."""
        for engine in self.engines:
            engine.close()
