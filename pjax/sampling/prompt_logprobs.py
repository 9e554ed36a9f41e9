"""Log-probabilities of prompt tokens: the head over the hidden states of a step's chunks, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pjax.params import MAX_LOGPROBS
from pjax.sampling.vocabulary import WHOLE, Vocabulary

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
    """Scores of each target; the first `count` of each array are written."""

    logprobs: jax.Array  # float32 [T]
    ranks: jax.Array  # int32 [T], 1 is the likeliest
    top_tokens: jax.Array  # int32 [T, min(MAX_LOGPROBS, V)]
    top_logprobs: jax.Array  # float32 [T, min(MAX_LOGPROBS, V)]


def scored_struct(num_tokens: int) -> ScoredTokens:
    """Shapes and types."""
    struct: Any = jax.ShapeDtypeStruct
    return ScoredTokens(struct((num_tokens,), jnp.int32), struct((num_tokens,), jnp.int32), struct((), jnp.int32))


def score_prompt(
    head: Callable[[jax.Array], jax.Array], vocab_size: int, hidden: jax.Array, scored: ScoredTokens, vocabulary: Vocabulary = WHOLE
) -> PromptScores:
    """Scores the targets by the hidden states [T, D] before them.

    Args:
      head: hidden states [n, D] to float32 logits [n, vocab_size].
    """
    num_tokens = hidden.shape[0]
    block = min(num_tokens, BLOCK)
    size = -(-num_tokens // block) * block
    sources, targets = (jnp.pad(array, (0, size - num_tokens)) for array in (scored.sources, scored.targets))
    top = min(MAX_LOGPROBS, vocabulary.size or vocab_size)
    empty = PromptScores(
        jnp.zeros((size,), jnp.float32),
        jnp.zeros((size,), jnp.int32),
        jnp.zeros((size, top), jnp.int32),
        jnp.zeros((size, top), jnp.float32),
    )

    def score(turn: jax.Array, scores: PromptScores) -> PromptScores:
        at = turn * block
        logits = head(hidden[lax.dynamic_slice_in_dim(sources, at, block)])
        logprobs = vocabulary.log_softmax(vocabulary.without_padding(logits))
        chosen = vocabulary.take(logprobs, lax.dynamic_slice_in_dim(targets, at, block))
        ranks = vocabulary.sum(logprobs > chosen[:, None]) + 1
        top_logprobs, top_tokens = vocabulary.top_k(logprobs, top)
        new = PromptScores(chosen, ranks, top_tokens, top_logprobs)
        written: PromptScores = jax.tree.map(lambda array, part: lax.dynamic_update_slice_in_dim(array, part, at, axis=0), scores, new)
        return written

    return lax.fori_loop(0, (scored.count + block - 1) // block, score, empty)
