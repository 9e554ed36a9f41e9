"""What is done to logits before temperature: logits processors, rules, penalties; each only when some row asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pjax.sampling.parameters import FIRST_PROCESSOR, HAS_BAD_SEQUENCES, SamplingArrays
from pjax.sampling.token_rules import NOWHERE, RuleTables, apply_bad_sequences, apply_rules, has
from pjax.sampling.vocabulary import WHOLE, Vocabulary

LogitsProcessor = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
COUNTED = 128  # tokens of each row counted at a time


def needs_adjusting(positions: jax.Array, params: SamplingArrays) -> jax.Array:
    """bool []: whether any row's logits are to be changed."""
    return jnp.any((params.flags != 0) | (positions < params.min_lens) | _penalised(params))


def adjust_logits(
    logits: jax.Array,
    positions: jax.Array,
    params: SamplingArrays,
    tables: RuleTables,
    tokens: jax.Array,
    processors: Sequence[LogitsProcessor] = (),
    vocabulary: Vocabulary = WHOLE,
) -> jax.Array:
    """Logits float32 [S, V], or a device's share of them, as the rows want them.

    Args:
      positions: int32 [S], the position of the token to be sampled: how many tokens the row has.
      tokens: int32 [R, max_model_len], the token table.
    """
    for index, process in enumerate(processors):
        logits = _process(logits, positions, params, tokens, process, 1 << (FIRST_PROCESSOR + index), vocabulary)
    logits = apply_rules(logits, positions, params, tables, vocabulary)
    logits = lax.cond(
        jnp.any(has(params.flags, HAS_BAD_SEQUENCES)),
        lambda x: apply_bad_sequences(x, positions, params, tables, tokens, vocabulary),
        lambda x: x,
        logits,
    )
    return lax.cond(jnp.any(_penalised(params)), lambda x: penalise(x, positions, params, tokens, vocabulary), lambda x: x, logits)


def _process(
    logits: jax.Array,
    positions: jax.Array,
    params: SamplingArrays,
    tokens: jax.Array,
    process: LogitsProcessor,
    flag: int,
    vocabulary: Vocabulary,
) -> jax.Array:
    wanted = has(params.flags, flag)

    def run(x: jax.Array) -> jax.Array:
        made = process(vocabulary.gather(x), tokens[params.rows], positions)
        own = jax.vmap(lambda row: vocabulary.own_columns(row, x.shape[1]))(made)
        return jnp.where(wanted[:, None], vocabulary.without_padding(own), x)

    return lax.cond(jnp.any(wanted), run, lambda x: x, logits)


def _penalised(params: SamplingArrays) -> jax.Array:
    return (params.repetition_penalty != 1) | (params.presence_penalty != 0) | (params.frequency_penalty != 0)


def penalise(
    logits: jax.Array, positions: jax.Array, params: SamplingArrays, tokens: jax.Array, vocabulary: Vocabulary = WHOLE
) -> jax.Array:
    """Repetition (Keskar et al. 2019, section 4.1: of prompt and output), then frequency and presence (of the output), as vLLM."""
    counts = count_tokens(tokens, positions, params, logits.shape[1], vocabulary)
    seen, times = counts > 0, counts >> 1
    penalty = params.repetition_penalty[:, None]
    logits = jnp.where(seen & (penalty != 1), jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits - params.frequency_penalty[:, None] * times.astype(jnp.float32)
    return logits - params.presence_penalty[:, None] * (times > 0).astype(jnp.float32)


def count_tokens(tokens: jax.Array, positions: jax.Array, params: SamplingArrays, width: int, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """int32 [S, width], of the device's columns: twice how often a token was generated, and 1 more if the prompt has it.

    Only what the row's penalties ask for is counted. The loops end with the longest row that asks, not with the table.
    """
    rows = positions.shape[0]
    index = jnp.arange(rows)[:, None]
    num_prompt = jnp.where(params.repetition_penalty != 1, params.prompt_lens, 0)
    num_output = jnp.where(_penalised(params), positions - params.prompt_lens, 0)

    def targets(first: jax.Array | int, offset: jax.Array, count: jax.Array) -> jax.Array:
        columns = offset + jnp.arange(COUNTED, dtype=jnp.int32)[None]
        found = tokens.at[params.rows[:, None], first + columns].get(mode="clip")
        return vocabulary.columns(jnp.where(columns < count[:, None], found, NOWHERE), width)

    def mark(chunk: jax.Array, counts: jax.Array) -> jax.Array:
        return counts.at[index, targets(0, chunk * COUNTED, num_prompt)].set(1, mode="drop")

    def add(chunk: jax.Array, counts: jax.Array) -> jax.Array:
        return counts.at[index, targets(params.prompt_lens[:, None], chunk * COUNTED, num_output)].add(2, mode="drop")

    counts = jnp.zeros((rows, width), jnp.int32)
    counts = lax.fori_loop(0, (jnp.max(num_prompt) + COUNTED - 1) // COUNTED, mark, counts)
    return lax.fori_loop(0, (jnp.max(num_output) + COUNTED - 1) // COUNTED, add, counts)
