"""Sampling parameters: what one request asks for. Every field is applied or refused."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from pjax.errors import InvalidRequestError

MAX_LOGPROBS = 20  # as OpenAI's and vLLM's default bound
MAX_N = 1024
MAX_CANDIDATES = 32  # likeliest tokens that a step gives for each row, where any row asks
MAX_STOP_STRINGS = 64
MAX_SEED = 2**63 - 1


def _bad(name: str, value: object, bound: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} is {value!r}, but must be {bound}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _plain(value: object) -> object:
    """Numbers of numpy and the like as Python's own."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, with vLLM's names and defaults.

    Raises InvalidRequestError when a value is out of its bounds, and TypeError for a name that pjax does not apply.
    """

    n: int = 1
    """Sequences to generate; the prompt is computed once and its pages are shared. Sample i draws with `seed + i`."""
    max_tokens: int | None = 16
    """Most tokens to generate; None means up to the model's length."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 or -1 means all."""
    top_p: float = 1.0
    """Only the smallest set of likeliest tokens whose probabilities reach p; in (0, 1]."""
    min_p: float = 0.0
    """Only tokens at least min_p times as likely as the likeliest; in [0, 1]."""
    seed: int | None = None
    """A row's draw depends on its seed and position only. None takes one from the engine's seed and request count."""
    stop: str | Sequence[str] | None = ()
    """Strings that end the text; they are cut off unless include_stop_str_in_output."""
    stop_token_ids: Sequence[int] | None = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    """Log-probabilities of the sampled token and of this many likeliest ones, per output token."""
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        for name in ("n", "max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "logprobs"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str) and not isinstance(value, Iterable):
                raise _bad(name, value, "a list")
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(_plain(token) for token in self.stop_token_ids or ()))
        self._check_numbers()
        if len(stop) > MAX_STOP_STRINGS:
            raise _bad("number of stop strings", len(stop), f"at most {MAX_STOP_STRINGS}")
        for text in stop:
            if not isinstance(text, str) or not text:
                raise _bad("stop", text, "a non-empty string or a list of them")
        for token in self.stop_token_ids or ():
            if not _is_int(token) or token < 0:
                raise _bad("stop_token_ids", token, "token ids >= 0")
        if stop and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize=True")
        for item in fields(self):
            if item.type == "bool" and not isinstance(getattr(self, item.name), bool):
                raise _bad(item.name, getattr(self, item.name), "True or False")

    def _check_numbers(self) -> None:
        if not _is_int(self.n) or not 1 <= self.n <= MAX_N:
            raise _bad("n", self.n, f"an integer in [1, {MAX_N}]")
        if self.max_tokens is not None and (not _is_int(self.max_tokens) or self.max_tokens < 1):
            raise _bad("max_tokens", self.max_tokens, "an integer >= 1")
        if not _is_number(self.temperature) or self.temperature < 0:
            raise _bad("temperature", self.temperature, "a finite number >= 0")
        if self.n > 1 and self.temperature == 0:
            raise InvalidRequestError(f"n is {self.n}, but must be 1 at temperature 0, where all samples are the same")
        if not _is_int(self.top_k) or self.top_k < -1:
            raise _bad("top_k", self.top_k, "an integer >= 1, or 0 or -1 for all")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise _bad("top_p", self.top_p, "in (0, 1]")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise _bad("min_p", self.min_p, "in [0, 1]")
        if self.seed is not None and (not _is_int(self.seed) or not 0 <= self.seed <= MAX_SEED):
            raise _bad("seed", self.seed, f"an integer in [0, {MAX_SEED}]")
        if self.logprobs is not None and (not _is_int(self.logprobs) or not 0 <= self.logprobs <= MAX_LOGPROBS):
            raise _bad("logprobs", self.logprobs, f"an integer in [0, {MAX_LOGPROBS}]")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Beam search as in transformers' `generate(num_beams=…, do_sample=False)`, with vLLM's names.

    Raises InvalidRequestError when a value is out of its bounds, and TypeError for a name that pjax does not apply.
    """

    beam_width: int
    """Sequences that are continued at every step, and that are returned."""
    max_tokens: int
    """Most tokens to generate."""
    length_penalty: float = 1.0
    """The score is the sum of log-probabilities / number of generated tokens ** this: above 0 it favours long sequences."""
    early_stopping: bool | str = False
    """When `beam_width` sequences have ended: True stops; False stops when the likeliest beam, were it to end now, would
    score lower than all of them; "never" stops when it could not score higher at any length up to `max_tokens`."""
    ignore_eos: bool = False
    temperature: float = 0.0
    """The logits are divided by it before the log-probabilities are taken; 0 leaves them alone, as 1 does."""

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens", "length_penalty", "temperature"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        for name in ("beam_width", "max_tokens"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise _bad(name, getattr(self, name), "an integer >= 1")
        if not _is_number(self.length_penalty):
            raise _bad("length_penalty", self.length_penalty, "a finite number")
        if not _is_number(self.temperature) or self.temperature < 0:
            raise _bad("temperature", self.temperature, "a finite number >= 0")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise _bad("early_stopping", self.early_stopping, 'True, False or "never"')
        if not isinstance(self.ignore_eos, bool):
            raise _bad("ignore_eos", self.ignore_eos, "True or False")
