"""Sampling inside the step, exact and per row.

No sort: the smallest logit that top-k or top-p keeps is found by bisection over the ordered bits of float32, 32 passes
that vectorise on every backend. The token is drawn by adding noise and taking the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pjax.runner.vocabulary import WHOLE, Vocabulary

MASKED = -jnp.inf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
    """Per row; padding rows are greedy."""

    temperature: jax.Array  # float32 [S]; 0 is greedy
    top_k: jax.Array  # int32 [S]; 0 is off
    top_p: jax.Array  # float32 [S]; 1 is off
    min_p: jax.Array  # float32 [S]; 0 is off
    seed: jax.Array  # uint32 [S, 2]
    num_logprobs: jax.Array  # int32 [S]; -1: none wanted
    logprob_temperature: jax.Array  # float32 [S]; of the reported log-probabilities: 1 but for beams


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """What a step gives back to the host."""

    tokens: jax.Array  # int32 [S]
    logprobs: jax.Array  # float32 [S]; 0 where no row wants any
    ranks: jax.Array  # int32 [S], 1 is the likeliest
    top_tokens: jax.Array  # int32 [S, max_logprobs]
    top_logprobs: jax.Array  # float32 [S, max_logprobs]


def sample(logits: jax.Array, positions: jax.Array, params: SamplingArrays, max_logprobs: int, vocabulary: Vocabulary = WHOLE) -> Sampled:
    """A token for each row of float32 logits [S, V], or of a device's share of them, as `vocabulary` says.

    Args:
      positions: int32 [S], the position that the sampled token will have: with the row's seed it decides its draw.
      max_logprobs: how many of the likeliest tokens to report when any row asks for log-probabilities.
    """
    logits = vocabulary.without_padding(logits)
    greedy = vocabulary.argmax(logits)
    tokens = lax.cond(
        jnp.any(params.temperature > 0),
        lambda: jnp.where(params.temperature > 0, _draw(logits, positions, params, vocabulary), greedy),
        lambda: greedy,
    )
    return lax.cond(
        jnp.any(params.num_logprobs >= 0),
        lambda: _with_logprobs(logits / params.logprob_temperature[:, None], tokens, max_logprobs, vocabulary),
        lambda: _without_logprobs(tokens, max_logprobs),
    )


def _without_logprobs(tokens: jax.Array, count: int) -> Sampled:
    rows = tokens.shape[0]
    return Sampled(
        tokens,
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows, count), jnp.int32),
        jnp.zeros((rows, count), jnp.float32),
    )


def _with_logprobs(logits: jax.Array, tokens: jax.Array, count: int, vocabulary: Vocabulary) -> Sampled:
    """Log-probabilities of the model itself, before temperature and filters, as vLLM and OpenAI report them; beams choose by them."""
    logprobs = vocabulary.log_softmax(logits)
    chosen = vocabulary.take(logprobs, tokens)
    ranks = vocabulary.sum(logprobs > chosen[:, None]) + 1
    top_logprobs, top_tokens = vocabulary.top_k(logprobs, count)
    return Sampled(tokens, chosen, ranks, top_tokens, top_logprobs)


def _draw(logits: jax.Array, positions: jax.Array, params: SamplingArrays, vocabulary: Vocabulary) -> jax.Array:
    temperature = jnp.where(params.temperature > 0, params.temperature, 1.0)
    # The likeliest token's logit becomes 0 before the division: however small the temperature, it stays finite.
    scaled = filter_logits((logits - vocabulary.max(logits)[:, None]) / temperature[:, None], params, vocabulary)
    size, width = vocabulary.num_tokens(logits), logits.shape[-1]
    noise = jax.vmap(lambda seed, position: vocabulary.own_columns(_noise(seed, position, size), width))(params.seed, positions)
    return vocabulary.argmax(scaled + noise)


def _noise(seed: jax.Array, position: jax.Array, size: int) -> jax.Array:
    """Gumbel noise for each token: the likeliest after it is added is drawn from softmax (Gumbel 1954; Maddison et al. 2014).

    It belongs to seed, position and token, so a rounding error in some logit moves the draw only where two tokens are as
    good as tied. One number a row through the cumulative distribution would let every such error move it.
    """
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,), jnp.float32)


def filter_logits(logits: jax.Array, params: SamplingArrays, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """Logits (after temperature) with the tokens that min_p, top_k, then top_p drop set to -inf. Ties are kept."""
    least = vocabulary.max(logits) + jnp.log(params.min_p)  # log(0) is -inf: off
    logits = jnp.where(logits >= least[:, None], logits, MASKED)
    filters = jnp.any((params.top_k > 0) | (params.top_p < 1))
    return lax.cond(filters, lambda: _top_p(_top_k(logits, params.top_k, vocabulary), params.top_p, vocabulary), lambda: logits)


def _top_k(logits: jax.Array, top_k: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    size = vocabulary.num_tokens(logits)
    kept = jnp.where((top_k > 0) & (top_k < size), top_k, size)
    least = _largest_threshold(logits, lambda mask: vocabulary.sum(mask) >= kept)
    return jnp.where(_ordered_bits(logits) >= least[:, None], logits, MASKED)


def _top_p(logits: jax.Array, top_p: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    weights = vocabulary.softmax(logits)
    wanted = jnp.where(top_p < 1, top_p, 0.0)
    wanted = jnp.maximum(wanted, np.finfo(np.float32).tiny)  # however small p is, the likeliest token stays
    least = _largest_threshold(logits, lambda mask: vocabulary.sum(jnp.where(mask, weights, 0.0)) >= wanted)
    return jnp.where((_ordered_bits(logits) >= least[:, None]) | (top_p >= 1)[:, None], logits, MASKED)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """int32 that orders as the float32 does; -0 and 0 are the same."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _largest_threshold(logits: jax.Array, enough: object) -> jax.Array:
    """int32 [S]: the largest threshold for which `enough(ordered bits >= threshold)` holds in each row."""
    assert callable(enough)
    bits = _ordered_bits(logits)
    low = jnp.full(logits.shape[:1], np.iinfo(np.int32).min, jnp.int32)  # always enough
    high = jnp.full(logits.shape[:1], np.iinfo(np.int32).max, jnp.int32)  # never enough: above +inf's bits

    def body(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        holds = enough(bits >= middle[:, None])
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    return lax.fori_loop(0, 32, body, (low, high))[0]
