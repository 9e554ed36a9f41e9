"""Beam search: which continuations live on. Knows tokens and log-probabilities, nothing of pages or rows.

The rules are those of transformers' `generate(num_beams=…)`: of all continuations of all beams the likeliest
`num_candidates` are looked at. Those among the first `width` of them that end a sequence are finished and compete by
their scores; the likeliest `width` that do not end one are the next beams.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pjax.params import BeamSearchParams

Floats = npt.NDArray[np.float32]
Candidates = tuple[npt.NDArray[np.int32], Floats]  # of one beam, the likeliest first: tokens, log-probabilities


def num_candidates(beam_width: int, num_eos: int) -> int:
    """Continuations to look at: enough that `beam_width` of them go on, whichever end a sequence."""
    return max(2, 1 + num_eos) * beam_width


def score(cum_logprob: float, length: int, length_penalty: float) -> float:
    """cum_logprob / length ** length_penalty, as torch divides: a power beyond float64 is infinite or 0, and raises nothing."""
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        return float(np.float64(cum_logprob) / np.float64(length) ** np.float64(length_penalty))


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished sequence."""

    score: float
    """cum_logprob / len(tokens) ** length_penalty."""
    cum_logprob: float
    tokens: list[int]
    """Generated ones, the end-of-sequence token included."""
    ended: bool
    """By an end-of-sequence token; else by its length."""


class BeamSearch:
    """One prompt's search. `beams` says which of the prompt's sequences live, the likeliest first; at the start the first alone."""

    def __init__(self, params: BeamSearchParams, max_tokens: int, eos_token_ids: frozenset[int]) -> None:
        self.params = params
        self.max_tokens = max_tokens
        self.eos_token_ids = eos_token_ids
        self.width = params.beam_width
        self.num_candidates = num_candidates(self.width, len(eos_token_ids))
        self.temperature = params.temperature or 1.0
        self.beams = [0]
        self.finished: list[Hypothesis] = []  # at most `width`, the best first
        self.done = False
        self.cum_logprobs: Floats = np.zeros(1, np.float32)
        """Sums of log-probabilities, one for each beam."""

    def choose(self, outputs: list[list[int]], candidates: list[Candidates]) -> list[tuple[int, int]]:
        """(beam, token) of the next beams, the likeliest first; none when the search is done.

        Args:
          outputs: each beam's tokens so far.
          candidates: each beam's likeliest continuations, at least `num_candidates` or the whole vocabulary.
        """
        sums = np.concatenate([total + logprobs for total, (_, logprobs) in zip(self.cum_logprobs, candidates, strict=True)])
        tokens = np.concatenate([tokens for tokens, _ in candidates])
        beams = np.repeat(np.arange(len(candidates)), [len(tokens) for tokens, _ in candidates])
        best = np.argsort(-sums, kind="stable")[: self.num_candidates]
        length = len(outputs[0]) + 1
        going: list[tuple[int, int]] = []
        cum_logprobs: list[np.float32] = []
        ended: list[Hypothesis] = []
        for rank, index in enumerate(best.tolist()):
            beam, token, total = int(beams[index]), int(tokens[index]), sums[index]
            is_end = token in self.eos_token_ids
            if not is_end and length < self.max_tokens:
                if len(going) < self.width:
                    going.append((beam, token))
                    cum_logprobs.append(total)
            elif rank < self.width:
                ended.append(
                    Hypothesis(score(float(total), length, self.params.length_penalty), float(total), [*outputs[beam], token], is_end)
                )
        # All that end in one step are compared at once; of equals the earlier stays. Sorting is stable.
        self.finished = sorted([*self.finished, *ended], key=lambda hypothesis: -hypothesis.score)[: self.width]
        self.cum_logprobs = np.array(cum_logprobs, np.float32)
        self.done = not going or self._is_decided(length)
        return [] if self.done else going

    def _is_decided(self, length: int) -> bool:
        """Whether no beam that goes on is thought to beat the finished ones."""
        if len(self.finished) < self.width:
            return False
        if self.params.early_stopping is True:
            return True
        hopeful = self.params.early_stopping == "never" and self.params.length_penalty > 0
        best = score(float(self.cum_logprobs[0]), self.max_tokens if hopeful else length, self.params.length_penalty)
        return best <= self.finished[-1].score
