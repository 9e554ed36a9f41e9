"""What the KV cache reads of a sequence and writes to it."""

from __future__ import annotations

from typing import Protocol

PRIVATE = -1
"""Epoch of a sequence whose pages nobody else may have: it went on with them when the weights were updated, or they may hold NaN."""


class CachedSequence(Protocol):
    """A sequence with tokens to cache; the scheduler's `Request` is one. Hashed by identity."""

    request_id: str
    row: int
    """Row of the block tables; -1 when it does not run."""
    num_computed: int
    """Tokens whose keys and values are in the pages once the steps under way have ended."""
    cache_salt: str | None
    """Its pages are shared only with sequences of the same salt."""
    epoch: int
    """The weights that its pages are computed with, a number that grows with each update; or PRIVATE."""
    page_keys: list[bytes]
    """Keys of its first full pages, as far as they were needed."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are known, prompt and output together."""
        ...

    @property
    def scores_prompt(self) -> bool:
        """Whether all of its prompt has to be computed, for the log-probabilities of its tokens."""
        ...

    def tokens_between(self, start: int, end: int) -> list[int]:
        """Returns tokens `[start, end)`."""
        ...
