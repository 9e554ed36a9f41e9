"""What one step computes: plain numbers, no device arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from pjax.scheduler.request import Request

NO_BLOCKS = np.zeros((0, 2), np.int32)


@dataclass(frozen=True, slots=True, eq=False)
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
    copies: npt.NDArray[
        np.int32
    ]  # [c, 2], c <= n · groups of layers: pages to be copied, from and to, one after the other, before the step writes keys and values
    swap_outs: npt.NDArray[np.int32]  # [o, 2]: pages to be copied to host slots, before all else
    swap_ins: npt.NDArray[np.int32]  # [i, 2]: host slots to be copied to pages, then
    blocks: npt.NDArray[np.int32] = field(default_factory=lambda: NO_BLOCKS)
    """[b, 2]: cells of the flat block tables [groups, rows, W] that have changed since the last plan, and the page ids that they hold."""
    scored: list[tuple[int, int, int]] = field(default_factory=list)
    """Row of the plan, first and last + 1 position of the prompt tokens whose next token's log-probability is wanted."""

    @classmethod
    def make(
        cls,
        given: dict[Request, int],
        copies: Sequence[tuple[int, int]],
        swap_outs: Sequence[tuple[int, int]] = (),
        swap_ins: Sequence[tuple[int, int]] = (),
        blocks: npt.NDArray[np.int32] = NO_BLOCKS,
    ) -> StepPlan:
        """The plan that computes so many of each request's next tokens."""
        ordered = sorted(given, key=attrgetter("rank"))  # nearly in order already
        requests = [request for request in ordered if given[request] == 1]
        num_decode = len(requests)
        requests += [request for request in ordered if given[request] > 1]
        counts = [given[request] for request in requests]
        sampled: list[Request] = []
        sources: list[int] = []
        for index, (request, count) in enumerate(zip(requests, counts, strict=True)):
            if request.num_computed + count == request.num_planned:
                sampled.append(request)
                sources.append(index)
                if request.followers and request.beam is None:
                    sampled += request.followers
                    sources += [index] * len(request.followers)
        return cls(
            requests=requests,
            rows=np.array([request.row for request in requests], np.int32),
            starts=np.array([request.num_computed for request in requests], np.int32),
            counts=np.array(counts, np.int32),
            num_decode=num_decode,
            sampled=sampled,
            sample_rows=np.array([request.row for request in sampled], np.int32),
            sample_sources=np.array(sources, np.int32),
            copies=np.array(copies, np.int32).reshape(-1, 2),
            swap_outs=np.array(swap_outs, np.int32).reshape(-1, 2),
            swap_ins=np.array(swap_ins, np.int32).reshape(-1, 2),
            blocks=blocks,
            scored=[span for index, request in enumerate(requests) if (span := _scored(index, request, counts[index]))],
        )

    @property
    def num_tokens(self) -> int:
        """Packed tokens of the step."""
        return int(self.counts.sum())


def _scored(index: int, request: Request, count: int) -> tuple[int, int, int] | None:
    """(row of the plan, start, end) of the positions that a row computes before prompt tokens that are to be scored; None without any."""
    if request.params.prompt_logprobs is None or not request.scores_prompt:
        return None
    start, end = request.num_computed, min(request.num_computed + count, len(request.prompt_token_ids) - 1)
    return (index, start, end) if start < end else None
