"""Log-probabilities of prompt tokens: the head over the hidden states of a step's chunks, a block of rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from pjax.params import MAX_LOGPROBS
from pjax.runner.vocabulary import WHOLE, Vocabulary
from pjax.scheduler.plan import StepPlan

Ints = npt.NDArray[np.int32]

BLOCK = 64  # rows of logits at a time: as many as the sampler holds at 64 sequences


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoredTokens:
    """Which packed tokens are scored, the first `count` of each array."""

    sources: jax.Array  # int32 [T], packed index of a prompt token
    targets: jax.Array  # int32 [T], the token that follows it in the prompt
    count: jax.Array  # int32 []


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptScores:
    """Of each target; the first `count` of each array are written."""

    logprobs: jax.Array  # float32 [T]
    ranks: jax.Array  # int32 [T], 1 is the likeliest
    top_tokens: jax.Array  # int32 [T, min(MAX_LOGPROBS, V)]
    top_logprobs: jax.Array  # float32 [T, min(MAX_LOGPROBS, V)]


def scored_struct(num_tokens: int) -> ScoredTokens:
    """Shapes and types."""
    struct: Any = jax.ShapeDtypeStruct
    return ScoredTokens(struct((num_tokens,), jnp.int32), struct((num_tokens,), jnp.int32), struct((), jnp.int32))


def pack_scored(plan: StepPlan, tokens: Ints, first_packed: Ints, num_tokens: int) -> ScoredTokens:
    """The plan's tokens to be scored, in its order.

    Args:
      tokens: int32 [rows, max_model_len], the sequence table.
      first_packed: int32 [n], packed index of the first token of each row of the plan.
    """
    sources, targets = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.int32)
    count = 0
    for index, start, end in plan.scored:
        size = end - start
        sources[count : count + size] = first_packed[index] + np.arange(start - plan.starts[index], end - plan.starts[index])
        targets[count : count + size] = tokens[plan.rows[index], start + 1 : end + 1]
        count += size
    return ScoredTokens(sources, targets, np.int32(count))  # type: ignore[arg-type]  # numpy in, device arrays inside the step


def score_prompt(model: Any, hidden: jax.Array, scored: ScoredTokens, vocabulary: Vocabulary = WHOLE) -> PromptScores:
    """Scores the targets by the hidden states [T, D] before them.

    With none to score nothing is computed. A loop without turns is not enough for that: where one block holds all tokens its
    body is the same in every turn, and XLA computes it before the loop.
    """
    num_tokens = hidden.shape[0]
    block = min(num_tokens, BLOCK)
    size = -(-num_tokens // block) * block
    sources, targets = (jnp.pad(array, (0, size - num_tokens)) for array in (scored.sources, scored.targets))
    top = min(MAX_LOGPROBS, vocabulary.size or model.config.vocab_size)
    empty = PromptScores(
        jnp.zeros((size,), jnp.float32),
        jnp.zeros((size,), jnp.int32),
        jnp.zeros((size, top), jnp.int32),
        jnp.zeros((size, top), jnp.float32),
    )

    def score(turn: jax.Array, scores: PromptScores) -> PromptScores:
        at = turn * block
        logits = model.logits(hidden[lax.dynamic_slice_in_dim(sources, at, block)])
        logprobs = vocabulary.log_softmax(vocabulary.without_padding(logits))
        chosen = vocabulary.take(logprobs, lax.dynamic_slice_in_dim(targets, at, block))
        ranks = vocabulary.sum(logprobs > chosen[:, None]) + 1
        top_logprobs, top_tokens = vocabulary.top_k(logprobs, top)
        new = PromptScores(chosen, ranks, top_tokens, top_logprobs)
        written: PromptScores = jax.tree.map(lambda array, part: lax.dynamic_update_slice_in_dim(array, part, at, axis=0), scores, new)
        return written

    def score_all() -> PromptScores:
        return lax.fori_loop(0, (scored.count + block - 1) // block, score, empty)

    return lax.cond(scored.count > 0, score_all, lambda: empty)
