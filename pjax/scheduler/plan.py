"""What one step computes: plain numbers, no device arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pjax.scheduler.request import Request


@dataclass(frozen=True, slots=True)
class StepPlan:
    """n rows; those with exactly one token come first. Row i computes positions `[starts[i], starts[i] + counts[i])`."""

    requests: list[Request]
    rows: npt.NDArray[np.int32]  # [n], row of the sequence table
    starts: npt.NDArray[np.int32]  # [n]
    counts: npt.NDArray[np.int32]  # [n], >= 1
    samples: npt.NDArray[np.bool_]  # [n], whether the row catches up with its tokens, so that a new one is sampled
    num_decode: int  # rows with exactly one token

    @property
    def num_tokens(self) -> int:
        """Packed tokens of the step."""
        return int(self.counts.sum())
