"""A request as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from pjax.outputs import RequestMetrics
from pjax.params import LogitRules, SamplingParams
from pjax.scheduler.beam_search import BeamSearch, Candidates


class RequestStatus(Enum):
    """Waiting has no row and no pages; running has both; finished has neither.

    Following is in no queue and waits for others of its prompt: until the prompt is computed, with a row if that runs, or
    as a beam that gave its pages away and has nothing to compute until the other beams have caught up.
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
    rules: LogitRules | None = None
    """None when there are none."""
    cache_salt: str | None = None
    """Its pages are shared only with requests of the same salt."""
    priority: int = 0
    """The lower, the earlier it is served."""
    deadline: float | None = None
    """Seconds of `time.monotonic()`: it ends then with what it has."""
    output_token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose keys and values are in the pages once the steps under way have ended: `[0, num_computed)`."""
    num_in_flight: int = 0
    """Tokens that steps under way sample for it, and that the host does not know yet. `Scheduler` alone counts them."""
    row: int = -1
    """Row of the sequence table; -1 when not running."""
    rank: tuple[float, int] = (0.0, -1)
    """Who is served first: the smaller. Seconds, then the place in the order of arrival; never changes while it is unfinished."""
    index: int = 0
    """Which of the sequences of one prompt."""
    followers: list[Request] = field(default_factory=list)
    """Others of the same prompt, forked from this one when the prompt is computed; empty from then on."""
    beam: BeamSearch | None = None
    """The search that all sequences of the prompt belong to."""
    candidates: Candidates | None = None
    """What may follow a beam that has caught up."""
    status: RequestStatus = RequestStatus.WAITING
    epoch: int = 0
    """The weights that its pages are computed with, a number that grows with each update; or `kv_cache.sequence.PRIVATE`."""
    page_keys: list[bytes] = field(default_factory=list)
    """Keys of its first full pages, as far as they were needed."""
    num_cached_tokens: int | None = None
    """Tokens that were in the pages already when it first ran; None before."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it; with reason "error" a message."""

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_planned(self) -> int:
        """Tokens once the steps under way have ended; which ones a beam goes on with is chosen on the host."""
        known = len(self.prompt_token_ids) + len(self.output_token_ids)
        return known + self.num_in_flight if self.beam is None else known

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are wanted and not all there: of its sequences the first computes all of it."""
        return self.params.prompt_logprobs is not None and self.index == 0 and not self.output_token_ids

    def tokens_between(self, start: int, end: int) -> list[int]:
        """Tokens `[start, end)` of prompt and output together."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        return self.prompt_token_ids[start:] + self.output_token_ids[max(start - num_prompt, 0) : end - num_prompt]
