"""Figures of a running engine, for logs and metrics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one step did."""

    seconds: float | None
    """From the end of the step before, or from its own dispatch if the device was idle, to its tokens on the host.

    None where that is not the step's time: a program was compiled meanwhile, or nobody called `step` for a while.
    """
    num_prefill_tokens: int
    """Tokens of rows with more than one token."""
    num_decode_tokens: int
    num_rows: int


@dataclass(slots=True)
class Counters:
    """Sums since the engine was made."""

    num_steps: int = 0
    prompt_tokens: int = 0
    """Tokens of the prompts that have been computed, cached ones included."""
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    """Prompt tokens that were looked for in the page pool."""
    prefix_cache_hits: int = 0
    """Those that were found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot. Each figure is right by itself; a step may have come between two of them."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_used_pages: int
    num_cached_pages: int
    """Free pages that are still found by what they hold."""
    num_shared_pages: int
    """Used pages with more than one owner."""
    num_preemptions: int
    num_compilations: int
    num_steps: int
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    page_owners: npt.NDArray[np.uint8]
    """[num_pages]: sequences that own each page, at most 255."""
    page_cached: npt.NDArray[np.bool_]
    """[num_pages]: whether what a page holds can be found, whether somebody owns it or not."""

    @property
    def kv_cache_usage(self) -> float:
        """Share of the pages that are used, in [0, 1]."""
        return self.num_used_pages / self.num_pages
