"""Rules about single tokens and short sequences, by row, on the device.

Sets of tokens are bits, so that lists of any length take V / 8 bytes a row; biases and bad sequences have a fixed number of
places. A row is written when a request that has rules gets it: a step reads the tables and sends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.typing import DTypeLike

from pjax.params import LogitRules
from pjax.params.limits import MAX_BAD_LENGTH, MAX_BAD_SEQUENCES, MAX_BIASED_TOKENS
from pjax.sampling.parameters import HAS_ALLOWED, HAS_BAD_SEQUENCES, HAS_BIAS, SamplingArrays
from pjax.sampling.vocabulary import WHOLE, Vocabulary

WORD = 32  # tokens in one number
BIAS_CHUNK = 64  # biased tokens added at a time
EMPTY = -1  # no token
NOWHERE = 2**31 - 1  # beyond any vocabulary: what goes there is dropped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RuleTables:
    """R rows, as those of the token table. With a vocabulary of 49,152 a row takes 36 KiB."""

    allowed: jax.Array  # uint32 [R, ceil(V / 32)], a bit for each token
    stops: jax.Array  # uint32 [R, ceil(V / 32)]
    bias_tokens: jax.Array  # int32 [R, MAX_BIASED_TOKENS], EMPTY behind the last
    bias_values: jax.Array  # float32 [R, MAX_BIASED_TOKENS]
    bad_sequences: jax.Array  # int32 [R, MAX_BAD_SEQUENCES, MAX_BAD_LENGTH], EMPTY before the first token of each


def tables_struct(num_rows: int, vocab_size: int) -> RuleTables:
    """Shapes and types of the tables of so many rows."""
    struct: Any = jax.ShapeDtypeStruct
    bits = struct((num_rows, -(-vocab_size // WORD)), jnp.uint32)
    return RuleTables(
        bits,
        bits,
        struct((num_rows, MAX_BIASED_TOKENS), jnp.int32),
        struct((num_rows, MAX_BIASED_TOKENS), jnp.float32),
        struct((num_rows, MAX_BAD_SEQUENCES, MAX_BAD_LENGTH), jnp.int32),
    )


def empty_tables(num_rows: int, vocab_size: int, sharding: Any = None) -> RuleTables:
    """Tables that no row reads yet."""
    structs = tables_struct(num_rows, vocab_size)
    made: RuleTables = jax.tree.map(lambda struct: zeros(struct.shape, struct.dtype, sharding), structs)
    return made


def zeros(shape: tuple[int, ...], dtype: DTypeLike, sharding: Any = None) -> jax.Array:
    """As `jnp.zeros`; copied from the host where that can be, which needs no compiler (40 ms for each shape at start-up)."""
    if sharding is not None and not sharding.is_fully_addressable:
        return jnp.zeros(shape, dtype, device=sharding)
    return jax.device_put(np.zeros(shape, dtype), sharding, may_alias=False)


def as_row(rules: LogitRules, vocab_size: int) -> RuleTables:
    """A row of each table."""
    allowed = np.ones(vocab_size, bool)
    if rules.allowed is not None:
        allowed[:] = False
        allowed[list(rules.allowed)] = True
    allowed[list(rules.banned)] = False
    stops = np.zeros(vocab_size, bool)
    stops[list(rules.stops)] = True
    bias_tokens = np.full(MAX_BIASED_TOKENS, EMPTY, np.int32)
    bias_values = np.zeros(MAX_BIASED_TOKENS, np.float32)
    for index, (token, value) in enumerate(rules.bias):
        bias_tokens[index], bias_values[index] = token, value
    bad = np.full((MAX_BAD_SEQUENCES, MAX_BAD_LENGTH), EMPTY, np.int32)
    for index, tokens in enumerate(rules.bad_sequences):
        bad[index, -len(tokens) :] = tokens
    return RuleTables(_to_bits(allowed), _to_bits(stops), bias_tokens, bias_values, bad)  # type: ignore[arg-type]


@jax.jit
def write_row(tables: RuleTables, row: jax.Array | np.integer[Any], one: RuleTables) -> RuleTables:
    """The tables with another row; the old ones stay as they are for the steps that read them still."""
    written: RuleTables = jax.tree.map(lambda table, new: table.at[row].set(new), tables, one)
    return written


@partial(jax.jit, donate_argnums=0)
def write_tokens(tokens: jax.Array, row: jax.Array | np.integer[Any], known: jax.Array | npt.NDArray[np.int32]) -> jax.Array:
    """The token table with a row's known tokens, int32 [max_model_len]; where they are -1 it stays as it is."""
    return tokens.at[row].set(jnp.where(known >= 0, known, tokens[row]))


def _to_bits(tokens: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    padded = np.zeros(-(-len(tokens) // WORD) * WORD, bool)
    padded[: len(tokens)] = tokens
    return np.packbits(padded, bitorder="little").view(np.uint32)


def _from_bits(bits: jax.Array, vocab_size: int) -> jax.Array:
    """uint32 [S, ceil(V / 32)] to bool [S, V]."""
    each = (bits[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
    return each.reshape(bits.shape[0], -1)[:, :vocab_size] != 0


def has(flags: jax.Array, flag: int) -> jax.Array:
    """Rows whose flag is set."""
    return (flags & flag) != 0


def apply_rules(
    logits: jax.Array, positions: jax.Array, params: SamplingArrays, tables: RuleTables, vocabulary: Vocabulary = WHOLE
) -> jax.Array:
    """Logits [S, V], or a device's share, with tokens at -inf that the row must not get, or not yet, and biases added."""
    limited, early, biased = has(params.flags, HAS_ALLOWED), positions < params.min_lens, has(params.flags, HAS_BIAS)

    def mask(bits: jax.Array, rows: jax.Array, unless: bool) -> Any:
        def apply(x: jax.Array) -> jax.Array:
            whole = _from_bits(bits[params.rows], vocabulary.num_tokens(x))
            own = jax.vmap(lambda row: vocabulary.own_columns(row, x.shape[1]))(whole)
            return jnp.where((own != unless) & rows[:, None], -jnp.inf, x)

        return apply

    logits = lax.cond(jnp.any(limited), mask(tables.allowed, limited, True), lambda x: x, logits)
    logits = lax.cond(jnp.any(biased), lambda x: _add_bias(x, biased, params.rows, tables, vocabulary), lambda x: x, logits)
    return lax.cond(jnp.any(early), mask(tables.stops, early, False), lambda x: x, logits)


def _add_bias(logits: jax.Array, biased: jax.Array, rows: jax.Array, tables: RuleTables, vocabulary: Vocabulary) -> jax.Array:
    tokens = jnp.where(biased[:, None], tables.bias_tokens[rows], EMPTY)
    values = tables.bias_values[rows]
    most = jnp.max(jnp.sum(tokens != EMPTY, axis=1, dtype=jnp.int32))
    index = jnp.arange(logits.shape[0])[:, None]

    def add(chunk: jax.Array, x: jax.Array) -> jax.Array:
        some = lax.dynamic_slice_in_dim(tokens, chunk * BIAS_CHUNK, BIAS_CHUNK, axis=1)
        value = lax.dynamic_slice_in_dim(values, chunk * BIAS_CHUNK, BIAS_CHUNK, axis=1)
        return x.at[index, vocabulary.columns(jnp.where(some == EMPTY, NOWHERE, some), x.shape[1])].add(value, mode="drop")

    return lax.fori_loop(0, (most + BIAS_CHUNK - 1) // BIAS_CHUNK, add, logits)


def apply_bad_sequences(
    logits: jax.Array,
    positions: jax.Array,
    params: SamplingArrays,
    tables: RuleTables,
    tokens: jax.Array,
    vocabulary: Vocabulary = WHOLE,
) -> jax.Array:
    """Logits with the last token of every bad sequence at -inf whose other tokens were generated last.

    Where that would leave no token at all the row's logits stay as they are.
    """
    width = MAX_BAD_LENGTH - 1
    columns = positions[:, None] + jnp.arange(-width, 0, dtype=jnp.int32)
    newest = jnp.where(columns >= params.prompt_lens[:, None], tokens[params.rows[:, None], jnp.maximum(columns, 0)], -2)
    bad = tables.bad_sequences[params.rows]
    matches = jnp.all((bad[:, :, :-1] == newest[:, None]) | (bad[:, :, :-1] == EMPTY), axis=-1)
    matches &= has(params.flags, HAS_BAD_SEQUENCES)[:, None] & (bad[:, :, -1] != EMPTY)
    index = jnp.arange(logits.shape[0])[:, None]
    last = vocabulary.columns(jnp.where(matches, bad[:, :, -1], NOWHERE), logits.shape[1])
    masked = logits.at[index, last].set(-jnp.inf, mode="drop")
    return jnp.where(vocabulary.max(masked)[:, None] > -jnp.inf, masked, logits)
