"""The program that samples: it follows the forward program of every step and is the same for all models of one vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from pjax.sampling.adjust import LogitsProcessor, adjust_logits
from pjax.sampling.parameters import PackedSampling, SamplingArrays, sampling_struct
from pjax.sampling.sampler import Sampled, sample
from pjax.sampling.token_rules import RuleTables, tables_struct
from pjax.sampling.vocabulary import WHOLE, Vocabulary

NO_ROW = 2**31 - 1  # beyond any token table: what goes there is dropped
MAX_PROGRAMS = 64  # traced programs that are kept for the next engine of the same vocabulary


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleInput:
    """What sampling takes beside logits [S, V] and the token table [R, max_model_len]."""

    rows: jax.Array  # int32 [S]: row of the token table that each token goes to; NO_ROW for padding
    positions: jax.Array  # int32 [S]: the position that the sampled token will have
    num_samples: jax.Array  # int32 []: rows of logits that count; they come first
    params: PackedSampling
    rules: RuleTables  # of R rows, as the token table


def sample_input_struct(num_rows: int, *, max_num_seqs: int, vocab_size: int) -> SampleInput:
    """Shapes and types for `num_rows` rows of logits and tables of `max_num_seqs` rows."""
    struct: Any = jax.ShapeDtypeStruct
    each = struct((num_rows,), jnp.int32)
    return SampleInput(each, each, struct((), jnp.int32), sampling_struct(num_rows), tables_struct(max_num_seqs, vocab_size))


SampleProgram = Callable[[jax.Array, jax.Array, SampleInput], tuple[jax.Array, Sampled]]


def make_sample(max_logprobs: int, vocabulary: Vocabulary = WHOLE, processors: tuple[LogitsProcessor, ...] = ()) -> SampleProgram:
    """The function `(logits, tokens, inputs) -> (tokens, Sampled)`.

    `logits` are float32 [S, V], or a device's share of them as `vocabulary` says. `tokens` int32 [R, max_model_len] keeps what is
    sampled, by row and position: the next step's forward program finds there what has not reached the host yet. It has all earlier
    tokens of the rows whose sampling depends on them.
    """

    def run(logits: jax.Array, tokens: jax.Array, inputs: SampleInput) -> tuple[jax.Array, Sampled]:
        def adjust(logits: jax.Array, positions: jax.Array, params: SamplingArrays) -> jax.Array:
            return adjust_logits(logits, positions, params, inputs.rules, tokens, processors, vocabulary)

        sampled = sample(logits, inputs.positions, inputs.params.unpack(), max_logprobs, vocabulary, adjust, inputs.num_samples)
        # A row that got none ends when the host hears of it; the next step may be under way by then, and must read some token.
        known = jnp.maximum(sampled.tokens, 0)
        return tokens.at[inputs.rows, inputs.positions].set(known, mode="drop"), sampled

    return run


def jit_sample(
    name: str,
    max_logprobs: int,
    vocabulary: Vocabulary = WHOLE,
    processors: tuple[LogitsProcessor, ...] = (),
    mesh: Mesh | None = None,
) -> Any:
    """`make_sample`, jitted under a name with the token table donated.

    One function for the same arguments: JAX keeps what it traced and compiled of it, for all engines of the process. With logits
    processors it is always another one: what they do may depend on more than the functions themselves.

    Args:
      mesh: where the vocabulary is divided, over the axis that `vocabulary` names.
    """
    if processors:
        return _jit_sample(name, max_logprobs, vocabulary, processors, mesh)
    return _shared_sample(name, max_logprobs, vocabulary, mesh)


@functools.lru_cache(maxsize=MAX_PROGRAMS)
def _shared_sample(name: str, max_logprobs: int, vocabulary: Vocabulary, mesh: Mesh | None) -> Any:
    return _jit_sample(name, max_logprobs, vocabulary, (), mesh)


def _jit_sample(name: str, max_logprobs: int, vocabulary: Vocabulary, processors: tuple[LogitsProcessor, ...], mesh: Mesh | None) -> Any:
    run = make_sample(max_logprobs, vocabulary, processors)
    if mesh is not None:
        whole = PartitionSpec()
        ins = (PartitionSpec(None, vocabulary.axis), whole, whole)
        run = jax.shard_map(run, mesh=mesh, in_specs=ins, out_specs=whole, check_vma=False)

    def named(logits: jax.Array, tokens: jax.Array, inputs: SampleInput) -> tuple[jax.Array, Sampled]:
        return run(logits, tokens, inputs)

    named.__name__ = named.__qualname__ = name
    return jax.jit(named, donate_argnums=1)
