"""A request as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from pjax.outputs import RequestMetrics
from pjax.params import SamplingParams


class RequestStatus(Enum):
    """Waiting has no row and no pages; running has both; following waits for another to compute what it shares, without
    pages, and with a row if that one runs; finished has neither.
    """

    WAITING = "waiting"
    FOLLOWING = "following"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True, kw_only=True)
class Request:
    """One sequence: its tokens, how many of them have keys and values, and how it ended."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int]
    """Empty when end-of-sequence is ignored."""
    seed: int
    metrics: RequestMetrics
    cache_salt: str | None = None
    """Its pages are shared only with requests of the same salt."""
    output_token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose keys and values are in the pages: `[0, num_computed)` of `[0, num_tokens)`."""
    row: int = -1
    """Row of the sequence table; -1 when not running."""
    order: int = -1
    """Place in the order of arrival; never changes."""
    index: int = 0
    """Which of the sequences of one prompt."""
    followers: list[Request] = field(default_factory=list)
    """Others of the same prompt, forked from this one when the prompt is computed; empty from then on."""
    status: RequestStatus = RequestStatus.WAITING
    page_keys: list[bytes] = field(default_factory=list)
    """Of its first full pages, as far as they were needed."""
    num_cached_tokens: int | None = None
    """Tokens that were in the pages already when it first ran; None before."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens_between(self, start: int, end: int) -> list[int]:
        """Tokens `[start, end)` of prompt and output together."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        return self.prompt_token_ids[start:] + self.output_token_ids[max(start - num_prompt, 0) : end - num_prompt]
