"""A checkpoint in pjax beside transformers: logits, each layer's input, greedy tokens. Needs torch and transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pjax.checkpoints.magic import is_gguf
from pjax.errors import ConfigError, UnsupportedError
from pjax.models import forward, load

LENGTHS = (1, 9, 40)  # of the random prompts
TOLERANCE = 1e-3  # of a token's vector: the length of the difference over its own; float32 rounding is below 1e-4


@dataclass(frozen=True)
class Finding:
    """How far pjax is from transformers somewhere: of the token that differs most, the difference's length over the vector's."""

    where: str
    difference: float

    @property
    def passed(self) -> bool:
        """Whether rounding explains it."""
        return self.difference <= TOLERANCE  # not a NaN either


@dataclass(frozen=True)
class Report:
    """Findings in the order of the computation, then the greedy tokens of both."""

    findings: tuple[Finding, ...]
    tokens: tuple[tuple[int, ...], ...]
    expected_tokens: tuple[tuple[int, ...], ...]

    @property
    def first_departure(self) -> Finding | None:
        """The earliest finding that rounding does not explain."""
        return next((finding for finding in self.findings if not finding.passed), None)

    @property
    def passed(self) -> bool:
        """Whether the two agree."""
        return self.first_departure is None and self.tokens == self.expected_tokens

    def __str__(self) -> str:
        lines = [
            f"{finding.where:24} {finding.difference:10.2e} {'' if finding.passed else 'DEPARTS'}".rstrip() for finding in self.findings
        ]
        same = sum(one == other for one, other in zip(self.tokens, self.expected_tokens, strict=True))
        lines.append(f"{'greedy tokens':24} {same} of {len(self.tokens)} prompts equal")
        departure = self.first_departure
        verdict = "PASS" if self.passed else f"FAIL: first departs at {departure.where if departure else 'the greedy tokens'}"
        return "\n".join([*lines, verdict])


class _Recorder:
    """Stands where a model's layer stack does, and keeps each layer's input."""

    def __init__(self, blocks: Any) -> None:
        self._blocks = blocks
        self.inputs: list[np.ndarray] = []

    def __call__(self, x: jax.Array, pages: jax.Array, *shared: Any) -> tuple[jax.Array, jax.Array]:
        for index, layer in enumerate(self._blocks.layers):
            self.inputs.append(np.asarray(x, np.float64))
            x, pages = layer(x, pages, index, *shared)
        return x, pages


class _Theirs:
    """The checkpoint in transformers."""

    def __init__(self, model: str | Path) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise ConfigError(f"verify compares with transformers, but {error.name} is missing: pip install torch transformers") from error
        path = Path(model)
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(model)}
        if path.is_file() and is_gguf(path):
            where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found: Any = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            except (ValueError, OSError) as error:  # a GGUF of gptneox, or an orbax folder
                raise UnsupportedError(f"{model}: transformers does not read it, so there is nothing to compare with: {error}") from error
        self._model, self._torch = found.eval(), torch

    def __call__(self, tokens: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
        """Each layer's input and the logits, float64 [T, D] and [T, V]."""
        with self._torch.inference_mode():
            output = self._model(self._torch.tensor([list(tokens)]), output_hidden_states=True)
        return [hidden[0].double().numpy() for hidden in output.hidden_states[:-1]], output.logits[0].double().numpy()


def verify(model: str | Path, *, max_tokens: int = 16, prompts: Sequence[Sequence[int]] | None = None, seed: int = 0) -> Report:
    """Compares a checkpoint (folder, .gguf file or hub id) in float32, on random token ids unless prompts are given.

    Raises ConfigError when torch or transformers is missing, and what `pjax.models.load` raises.
    """
    ours = load(model, dtype="float32", progress=False)
    theirs = _Theirs(model)
    rng = np.random.default_rng(seed)
    limit = ours.config.max_position - max_tokens
    lists = prompts or [rng.integers(0, ours.config.vocab_size, min(length, limit)).tolist() for length in LENGTHS]
    findings = _layers(ours, theirs, max(lists, key=len))
    tokens = tuple(tuple(_greedy(_logits_of(ours, len(prompt) + max_tokens), prompt, max_tokens)) for prompt in lists)
    expected = tuple(tuple(_greedy(lambda tokens: theirs(tokens)[1], prompt, max_tokens)) for prompt in lists)
    return Report(tuple(findings), tokens, expected)


def _layers(ours: Any, theirs: _Theirs, prompt: Sequence[int]) -> list[Finding]:
    inputs, expected = theirs(prompt)
    recorder = _Recorder(ours.blocks)
    recorded = nnx.merge(*nnx.split(ours))
    object.__setattr__(recorded, "blocks", recorder)
    logits = np.asarray(forward(recorded, jnp.asarray([list(prompt)], jnp.int32)), np.float64)
    found = [_finding(f"input of layer {index}", *pair) for index, pair in enumerate(zip(recorder.inputs, inputs, strict=True))]
    return [*found, _finding("logits", logits[0], expected)]


def _finding(where: str, mine: np.ndarray, theirs: np.ndarray) -> Finding:
    """Compares vectors [T, D] by their lengths: one large element, which trained models have, would hide behind a largest difference."""
    lengths = np.maximum(np.linalg.norm(theirs, axis=-1), np.finfo(np.float32).tiny)
    return Finding(where, float((np.linalg.norm(mine - theirs, axis=-1) / lengths).max()))


def _logits_of(ours: Any, length: int) -> Callable[[Sequence[int]], np.ndarray]:
    """The logits of sequences up to a length, padded to it, so that one program serves all."""
    step = jax.jit(lambda ids: forward(ours, ids)[0])
    return lambda tokens: np.asarray(step(jnp.asarray([[*tokens, *[0] * (length - len(tokens))]], jnp.int32)))[: len(tokens)]


def _greedy(logits_of: Callable[[Sequence[int]], np.ndarray], prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(tokens)[-1].argmax()))
    return tokens[len(prompt) :]
