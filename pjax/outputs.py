"""What a request gives back, with vLLM's names and shapes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token at one position."""

    logprob: float
    rank: int | None = None
    """1 for the likeliest token."""
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence; while streaming, what there is of it so far."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    """"stop" (end of sequence, stop token or stop string), "length", "abort", "timeout", or "error", where no next token could be
    sampled or something failed for this request on the host; None while running."""
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it; None for the end-of-sequence token. Of an "error" it is the message."""


@dataclass(slots=True)
class RequestMetrics:
    """Times are seconds of `time.monotonic()`."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token on the host."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """One request: its prompt and what was generated for it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int | None = None
    """Prompt tokens whose keys and values were in the page pool already; None before it first ran."""
    metrics: RequestMetrics = field(repr=False, default_factory=lambda: RequestMetrics(0.0))
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Log-probabilities of each prompt token and the likeliest in its place, None for the first; None where not wanted or not all there."""


@dataclass(slots=True)
class BeamSearchSequence:
    """One sequence that a beam search found."""

    tokens: list[int]
    """The prompt's and the generated ones, an end-of-sequence token included."""
    text: str
    """Text of all tokens, the prompt's too, as vLLM gives it; empty without a tokenizer."""
    cum_logprob: float
    """Sum of the generated tokens' log-probabilities."""
    score: float
    """cum_logprob / number of generated tokens ** length_penalty."""
    finish_reason: str
    """"stop" (end of sequence), "length", or "error", where some beam's next token could not be sampled."""
    stop_reason: int | str | None = None
    """The message of an "error"."""


@dataclass(slots=True)
class BeamSearchOutput:
    """One prompt's sequences, the highest score first."""

    sequences: list[BeamSearchSequence]
