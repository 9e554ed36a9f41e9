"""Sampling on the device, exact and per row: which token, and with what log-probability.

Whatever no row asks for is not computed; a batch that is greedy throughout pays for an argmax. The token is drawn by adding
noise and taking the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pjax.sampling.adjust import needs_adjusting
from pjax.sampling.filters import filter_logits
from pjax.sampling.parameters import SamplingArrays
from pjax.sampling.vocabulary import NOT_FINITE, WHOLE, Vocabulary

Adjust = Callable[[jax.Array, jax.Array, SamplingArrays], jax.Array]
"""Logits [S, V], the positions [S] of the tokens to be sampled and the rows' parameters to logits."""

ROWS = 16
NO_TOKEN = -2  # instead of a token: what the request asked for left none of the model's logits, or made them NaN or +inf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """What a step gives back to the host."""

    tokens: jax.Array  # int32 [S]; NOT_FINITE or NO_TOKEN, both below 0, for rows from which none can be sampled
    logprobs: jax.Array  # float32 [S]; 0 where no row wants any
    ranks: jax.Array  # int32 [S], 1 is the likeliest
    top_tokens: jax.Array  # int32 [S, max_logprobs]
    top_logprobs: jax.Array  # float32 [S, max_logprobs]


def sample(
    logits: jax.Array,
    positions: jax.Array,
    params: SamplingArrays,
    max_logprobs: int,
    vocabulary: Vocabulary = WHOLE,
    adjust: Adjust | None = None,
    num_rows: jax.Array | None = None,
) -> Sampled:
    """A token for each row of float32 logits [S, V], or of a device's share of them, as `vocabulary` says.

    Rows that ask for more than the likeliest token are done ROWS at a time: what that needs is a dozen arrays of [ROWS, V],
    which at all rows of a large vocabulary would be more than the model's own temporaries, and the others' blocks are spared.

    Args:
      positions: int32 [S], the position that the sampled token will have: with the row's seed it decides its draw.
      max_logprobs: how many of the likeliest tokens to report when any row asks for log-probabilities.
      adjust: what is done to the logits of rows that `needs_adjusting`, before temperature; log-probabilities are those before it.
      num_rows: int32 [], how many rows count, the first ones; by default all. The tokens of the others mean nothing.
    """
    logits = vocabulary.without_padding(logits)
    asked = jnp.any((params.temperature > 0) | (params.num_logprobs >= 0))
    if adjust is not None:
        asked |= needs_adjusting(positions, params)

    def in_blocks() -> Sampled:
        size = len(positions)
        if size <= ROWS:
            return _sample_block(logits, positions, params, max_logprobs, vocabulary, adjust)

        def block(index: jax.Array, sampled: Sampled) -> Sampled:
            first = jnp.minimum(index * ROWS, size - ROWS)  # the last block may do some rows again
            one, at, of = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, ROWS), (logits, positions, params))
            made = _sample_block(one, at, of, max_logprobs, vocabulary, adjust)
            written: Sampled = jax.tree.map(lambda x, new: lax.dynamic_update_slice_in_dim(x, new, first, 0), sampled, made)
            return written

        num_blocks = ((size if num_rows is None else num_rows) + ROWS - 1) // ROWS
        return lax.fori_loop(0, num_blocks, block, _without_logprobs(jnp.zeros((size,), jnp.int32), max_logprobs))

    return lax.cond(asked, in_blocks, lambda: _without_logprobs(vocabulary.pick(logits), max_logprobs))


def _sample_block(
    logits: jax.Array, positions: jax.Array, params: SamplingArrays, max_logprobs: int, vocabulary: Vocabulary, adjust: Adjust | None
) -> Sampled:
    drawn = jnp.any(params.temperature > 0)
    adjusted = jnp.array(False) if adjust is None else needs_adjusting(positions, params)

    def choose() -> jax.Array:
        changed, is_finite = logits, jnp.ones(logits.shape[:1], bool)
        if adjust is not None:  # a rule may hide the model's NaN from what follows
            changed, is_finite = lax.cond(
                adjusted,
                lambda: (adjust(logits, positions, params), vocabulary.can_pick(logits)),
                lambda: (changed, is_finite),
            )
        likeliest = vocabulary.pick(changed)
        likeliest = jnp.where(adjusted & (likeliest < 0), NO_TOKEN, likeliest)
        likeliest = jnp.where(is_finite, likeliest, NOT_FINITE)

        def mixed() -> jax.Array:
            return jnp.where((params.temperature > 0) & (likeliest >= 0), _draw(changed, positions, params, vocabulary), likeliest)

        return lax.cond(drawn, mixed, lambda: likeliest)

    tokens = lax.cond(drawn | adjusted, choose, lambda: vocabulary.pick(logits))
    return lax.cond(
        jnp.any(params.num_logprobs >= 0),
        lambda: _with_logprobs(_divided(logits, params.logprob_temperature, vocabulary), tokens, max_logprobs, vocabulary),
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
    scaled = filter_logits(_divided(logits, jnp.where(params.temperature > 0, params.temperature, 1.0), vocabulary), params, vocabulary)
    size, width = vocabulary.num_tokens(logits), logits.shape[-1]
    noise = jax.vmap(lambda seed, position: vocabulary.own_columns(_noise(seed, position, size), width))(params.seed, positions)
    return vocabulary.argmax(scaled + noise)


def _divided(logits: jax.Array, temperature: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """Logits, less the row's largest, divided by its temperature: the likeliest token's is 0 however small the temperature is."""
    return (logits - vocabulary.max(logits)[:, None]) / temperature[:, None]


def _noise(seed: jax.Array, position: jax.Array, size: int) -> jax.Array:
    """Gumbel noise for each token: the likeliest after it is added is drawn from softmax (Gumbel 1954; Maddison et al. 2014).

    It belongs to seed, position and token, so a rounding error in some logit moves the draw only where two tokens are as
    good as tied. One number a row through the cumulative distribution would let every such error move it.
    """
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,), jnp.float32)
