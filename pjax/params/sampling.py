"""Sampling parameters. docs/sampling.md says in which order they apply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from pjax.errors import InvalidRequestError
from pjax.params.limits import (
    MAX_BIAS,
    MAX_BIASED_TOKENS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_PENALTY,
    MAX_SEED,
    MAX_STOP_STRINGS,
    bad,
    is_int,
    is_number,
    plain,
)

NUMBERS = (
    "n",
    "best_of",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logprobs",
    "prompt_logprobs",
    "truncate_prompt_tokens",
)
LISTS = ("stop", "stop_token_ids", "bad_words", "bad_words_ids", "allowed_token_ids", "logits_processors")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, with vLLM's names and defaults.

    Raises InvalidRequestError when a value is out of its bounds, and TypeError for a name that pjax does not apply.
    """

    n: int = 1
    """Sequences to generate; the prompt is computed once and its pages are shared. Sample i draws with `seed + i`."""
    best_of: int | None = None
    """Sequences to generate, of which the n with the largest sum of log-probabilities are given; n by default."""
    max_tokens: int | None = 16
    """Most tokens to generate; None means up to the model's length."""
    min_tokens: int = 0
    """Before there are so many, no end-of-sequence token, stop token or stop string ends it."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 or -1 means all."""
    top_p: float = 1.0
    """Only the smallest set of likeliest tokens whose probabilities reach p; in (0, 1]."""
    min_p: float = 0.0
    """Only tokens at least min_p times as likely as the likeliest; in [0, 1]."""
    typical_p: float = 1.0
    """Only the smallest set of tokens of probability p whose surprise is nearest to the expected one (Meister et al. 2023); in (0, 1]."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or output are divided by it, negative ones multiplied (Keskar et al. 2019); above 0."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that were generated; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it was generated; in [-2, 2]."""
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Added to the logits of these tokens; in [-100, 100]."""
    allowed_token_ids: Sequence[int] | None = None
    """Only these tokens are generated."""
    bad_words: Sequence[str] | None = ()
    """Texts whose last token is not generated where the tokens before it were."""
    bad_words_ids: Sequence[Sequence[int]] | None = ()
    """The same as token ids, with transformers' name; a single token is `[id]`."""
    logits_processors: Sequence[str] | None = ()
    """Names of the engine's `logits_processors` that this request goes through, in the engine's order."""
    seed: int | None = None
    """A row's draw depends on its seed and position only. None takes one from the engine's seed and request count."""
    stop: str | Sequence[str] | None = ()
    """Strings that end the text; they are cut off unless include_stop_str_in_output."""
    stop_token_ids: Sequence[int] | None = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    """Log-probabilities of the sampled token and of this many likeliest ones, per output token, before any other field applies."""
    prompt_logprobs: int | None = None
    """The same of every prompt token but the first. Such a prompt is computed whole: cached pages are not read."""
    truncate_prompt_tokens: int | None = None
    """Only the last so many tokens of the prompt are used; -1 is as many as the model's length allows."""
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        self._normalise()
        self._check_counts()
        self._check_numbers()
        self._check_tokens()
        if self.stops and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize=True")
        for item in fields(self):
            if item.type == "bool" and not isinstance(getattr(self, item.name), bool):
                raise bad(item.name, getattr(self, item.name), "True or False")

    def _normalise(self) -> None:
        """Numbers and lists as Python's own; lists are tuples from here on."""
        for name in NUMBERS:
            object.__setattr__(self, name, plain(getattr(self, name)))
        for name in LISTS:
            value = getattr(self, name)
            if name == "stop" and isinstance(value, str):
                value = (value,)
            if value is not None and (isinstance(value, str) or not isinstance(value, Iterable)):
                raise bad(name, value, "a list")
            empty = None if name == "allowed_token_ids" else ()
            object.__setattr__(self, name, empty if value is None else tuple(map(plain, value)))
        given: Iterable[object] = self.bad_words_ids or ()
        for words in given:
            if isinstance(words, str) or not isinstance(words, Iterable):
                raise bad("bad_words_ids", words, "a list of lists of token ids")
        object.__setattr__(self, "bad_words_ids", tuple(tuple(map(plain, words)) for words in self.bad_words_ids or ()))
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise bad("logit_bias", self.logit_bias, "a mapping of token ids to numbers")
            object.__setattr__(self, "logit_bias", {plain(token): plain(value) for token, value in self.logit_bias.items()})

    def _check_counts(self) -> None:
        if not is_int(self.n) or not 1 <= self.n <= MAX_N:
            raise bad("n", self.n, f"an integer in [1, {MAX_N}]")
        if self.best_of is not None and (not is_int(self.best_of) or not self.n <= self.best_of <= MAX_N):
            raise bad("best_of", self.best_of, f"an integer in [n, {MAX_N}], where n is {self.n}")
        if self.max_tokens is not None and (not is_int(self.max_tokens) or self.max_tokens < 1):
            raise bad("max_tokens", self.max_tokens, "an integer >= 1")
        if not is_int(self.min_tokens) or self.min_tokens < 0:
            raise bad("min_tokens", self.min_tokens, "an integer >= 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise bad("min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}")
        if self.seed is not None and (not is_int(self.seed) or not 0 <= self.seed <= MAX_SEED):
            raise bad("seed", self.seed, f"an integer in [0, {MAX_SEED}]")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and (not is_int(value) or not 0 <= value <= MAX_LOGPROBS):
                raise bad(name, value, f"an integer in [0, {MAX_LOGPROBS}]")
        keep = self.truncate_prompt_tokens
        if keep is not None and (not is_int(keep) or (keep < 1 and keep != -1)):
            raise bad("truncate_prompt_tokens", keep, "an integer >= 1, or -1 for as many as the model's length allows")

    def _check_numbers(self) -> None:
        if not is_number(self.temperature) or self.temperature < 0:
            raise bad("temperature", self.temperature, "a finite number >= 0")
        for name, value in (("n", self.n), ("best_of", self.best_of)):
            if value is not None and value > 1 and self.temperature == 0:
                raise InvalidRequestError(f"{name} is {value}, but must be 1 at temperature 0, where all samples are the same")
        if not is_int(self.top_k) or self.top_k < -1:
            raise bad("top_k", self.top_k, "an integer >= 1, or 0 or -1 for all")
        for name in ("top_p", "typical_p"):
            if not is_number(getattr(self, name)) or not 0 < getattr(self, name) <= 1:
                raise bad(name, getattr(self, name), "in (0, 1]")
        if not is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise bad("min_p", self.min_p, "in [0, 1]")
        # float32 on the device: neither 0 nor infinite there
        if not is_number(self.repetition_penalty) or not 1e-30 <= self.repetition_penalty <= 1e30:
            raise bad("repetition_penalty", self.repetition_penalty, "above 0 (in [1e-30, 1e30])")
        for name in ("presence_penalty", "frequency_penalty"):
            if not is_number(getattr(self, name)) or abs(getattr(self, name)) > MAX_PENALTY:
                raise bad(name, getattr(self, name), f"in [{-MAX_PENALTY}, {MAX_PENALTY}]")

    def _check_tokens(self) -> None:
        stops = self.stops
        if len(stops) > MAX_STOP_STRINGS:
            raise bad("number of stop strings", len(stops), f"at most {MAX_STOP_STRINGS}")
        for name, texts in (("stop", stops), ("bad_words", self.bad_words or ()), ("logits_processors", self.logits_processors or ())):
            for text in texts:
                if not isinstance(text, str) or not text:
                    raise bad(name, text, "a non-empty string or a list of them" if name == "stop" else "a list of non-empty strings")
        for name, tokens in (("stop_token_ids", self.stop_token_ids or ()), ("allowed_token_ids", self.allowed_token_ids or ())):
            for token in tokens:
                if not is_int(token) or token < 0:
                    raise bad(name, token, "token ids >= 0")
        if self.allowed_token_ids == ():
            raise bad("allowed_token_ids", [], "None or at least one token id")
        for words in self.bad_words_ids or ():
            if not words or not all(is_int(token) and token >= 0 for token in words):
                raise bad("bad_words_ids", list(words), "lists of at least one token id >= 0")
        if len(self.logit_bias or ()) > MAX_BIASED_TOKENS:
            raise bad("number of logit_bias tokens", len(self.logit_bias or ()), f"at most {MAX_BIASED_TOKENS}")
        for token, value in (self.logit_bias or {}).items():
            if not is_int(token) or token < 0:
                raise bad("logit_bias", token, "a mapping of token ids >= 0")
            if not is_number(value) or abs(value) > MAX_BIAS:
                raise bad(f"logit_bias of token {token}", value, f"in [{-MAX_BIAS}, {MAX_BIAS}]")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def num_sequences(self) -> int:
        """Sequences that are generated: best_of or n."""
        return self.n if self.best_of is None else self.best_of

    @property
    def penalised(self) -> bool:
        """Whether tokens that were there before are more or less likely."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_history(self) -> bool:
        """Whether the step reads the sequence's earlier tokens from the token table."""
        return self.penalised or bool(self.bad_words) or bool(self.bad_words_ids) or bool(self.logits_processors)

    @property
    def needs_logprobs(self) -> bool:
        """Whether log-probabilities of sampled tokens are wanted, by the caller or to find the best of many."""
        return self.logprobs is not None or self.num_sequences > self.n
