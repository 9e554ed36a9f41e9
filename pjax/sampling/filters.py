"""Which tokens min_p, top_k, top_p and typical_p leave.

No sort: the smallest value that is kept is found by bisection over the ordered bits of float32, 32 passes that vectorise on
every backend.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pjax.sampling.parameters import SamplingArrays
from pjax.sampling.vocabulary import WHOLE, Vocabulary

MASKED = -jnp.inf


def filter_logits(logits: jax.Array, params: SamplingArrays, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """Logits (after temperature) with the tokens that min_p, top_k, top_p, then typical_p drop set to -inf. Ties are kept."""
    least = vocabulary.max(logits) + jnp.log(params.min_p)  # log(0) is -inf: off
    logits = jnp.where(logits >= least[:, None], logits, MASKED)
    filters = jnp.any((params.top_k > 0) | (params.top_p < 1))
    logits = lax.cond(filters, lambda: _top_p(_top_k(logits, params.top_k, vocabulary), params.top_p, vocabulary), lambda: logits)
    return lax.cond(jnp.any(params.typical_p < 1), lambda: _typical_p(logits, params.typical_p, vocabulary), lambda: logits)


def _top_k(logits: jax.Array, top_k: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    size = vocabulary.num_tokens(logits)
    kept = jnp.where((top_k > 0) & (top_k < size), top_k, size)
    least = _largest_threshold(logits, lambda mask: vocabulary.sum(mask) >= kept)
    return jnp.where(_ordered_bits(logits) >= least[:, None], logits, MASKED)


def _top_p(logits: jax.Array, top_p: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    return _nucleus(logits, logits, vocabulary.softmax(logits), top_p, vocabulary)


def _typical_p(logits: jax.Array, typical_p: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """Locally typical sampling (Meister et al. 2023, section 4): by how near a token's surprise is to the entropy."""
    logprobs = vocabulary.log_softmax(logits)
    weights = jnp.exp(logprobs)
    entropy = -vocabulary.sum(jnp.where(weights > 0, weights * logprobs, 0.0))[:, None]
    return _nucleus(logits, -jnp.abs(-logprobs - entropy), weights, typical_p, vocabulary)


def _nucleus(logits: jax.Array, order: jax.Array, weights: jax.Array, p: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """Only the tokens of largest `order` whose weights reach p; rows where p is 1 as they are."""
    wanted = jnp.where(p < 1, p, 0.0)
    wanted = jnp.maximum(wanted, np.finfo(np.float32).tiny)  # however small p is, the first token stays
    least = _largest_threshold(order, lambda mask: vocabulary.sum(jnp.where(mask, weights, 0.0)) >= wanted)
    return jnp.where((_ordered_bits(order) >= least[:, None]) | (p >= 1)[:, None], logits, MASKED)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """int32 that orders as the float32 does; -0 and 0 are the same."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _largest_threshold(logits: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """int32 [S]: the largest threshold for which `enough(ordered bits >= threshold)` holds in each row."""
    bits = _ordered_bits(logits)
    low = jnp.full(logits.shape[:1], np.iinfo(np.int32).min, jnp.int32)  # always enough
    high = jnp.full(logits.shape[:1], np.iinfo(np.int32).max, jnp.int32)  # never enough: above +inf's bits

    def body(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        holds = enough(bits >= middle[:, None])
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    return lax.fori_loop(0, 32, body, (low, high))[0]
