"""What one step computes: plain numbers, no device arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pjax.scheduler.request import Request


@dataclass(frozen=True, slots=True)
class StepPlan:
    """n rows; those with exactly one token come first. Row i computes positions `[starts[i], starts[i] + counts[i])`.

    m samples: sequence `sampled[j]` gets a token that follows the last one of row `sample_sources[j]`, its own or, when a
    prompt is computed that several sequences continue, the row of the first of them.
    """

    requests: list[Request]
    rows: npt.NDArray[np.int32]  # [n], row of the sequence table
    starts: npt.NDArray[np.int32]  # [n]
    counts: npt.NDArray[np.int32]  # [n], >= 1
    num_decode: int  # rows with exactly one token
    sampled: list[Request]
    sample_rows: npt.NDArray[np.int32]  # [m], rows of the sequence table
    sample_sources: npt.NDArray[np.int32]  # [m], rows of the plan
    copies: npt.NDArray[np.int32]  # [c, 2], c <= n: pages to be copied, from and to, one after the other, before anything is written

    @property
    def num_tokens(self) -> int:
        """Packed tokens of the step."""
        return int(self.counts.sum())
