"""The one jitted step: tokens in, pages updated, sampled tokens out. Prefill and decode are the same program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from pjax.models.attention import PagedContext
from pjax.models.sharding import MODEL_AXIS, Shares
from pjax.runner.adjust import LogitsProcessor, adjust_logits
from pjax.runner.batch import StepInput
from pjax.runner.prompt_logprobs import score_prompt
from pjax.runner.sampler import Sampled, sample
from pjax.runner.sampling_arrays import SamplingArrays
from pjax.runner.vocabulary import WHOLE, Vocabulary


def make_step(
    graph: Any,
    structure: Any,
    max_logprobs: int,
    backend: str | None,
    vocabulary: Vocabulary = WHOLE,
    processors: Sequence[LogitsProcessor] = (),
) -> Any:
    """The function `(params, pages, tokens, inputs) -> (pages, tokens, Sampled)` to be jitted with `pages` and `tokens` donated.

    `params` is the flat list of the model's arrays: flattening a module at each call costs more than a small step. `tokens`
    int32 [rows, max_model_len] keeps what is sampled, by row of the sequence table and position: the next step finds there
    what has not reached the host yet. It has all earlier tokens of the rows whose sampling depends on them.
    """

    def step(params: Sequence[jax.Array], pages: jax.Array, tokens: jax.Array, inputs: StepInput) -> tuple[jax.Array, jax.Array, Sampled]:
        model = nnx.merge(graph, jax.tree.unflatten(structure, params))
        pages = copy_pages(pages, inputs.copies, inputs.num_copies, model.config.num_layers)
        context = PagedContext.make(inputs.batch, pages, inputs.token_ids.shape[0], model.config.num_layers, backend)
        hidden, pages = model(known_tokens(inputs, context.positions, tokens), pages, context)
        sampled = sample_rows(model, hidden[inputs.sample_tokens], inputs, tokens, max_logprobs, vocabulary, processors)
        if inputs.scored is not None:
            sampled = replace(sampled, prompt=score_prompt(model, hidden, inputs.scored, vocabulary))
        tokens = tokens.at[inputs.sample_rows, inputs.sample_positions].set(sampled.tokens, mode="drop")
        return pages, tokens, sampled

    return step


POOL_SPEC = PartitionSpec(None, None, MODEL_AXIS)
"""Of a pool in a mesh: each device's rows are those of its own KV heads, all keys and then all values."""


def shard_step(step: Any, shares: Shares) -> Any:
    """A step of one device's share as a step of the mesh: its parameters and pages are divided, all else is the same everywhere.

    What goes between devices is what model and sampler say, and nothing else (docs/decisions/0009-tensor-parallel.md).
    """
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(shares.abstract)]
    whole = PartitionSpec()
    ins, outs = (specs, POOL_SPEC, whole, whole), (POOL_SPEC, whole, whole)
    return jax.shard_map(step, mesh=shares.mesh, in_specs=ins, out_specs=outs, check_vma=False)


def jit_step(step: Any, pool_format: Any, name: str = "step") -> Any:
    """The step, jitted under a name: the pool is given away and comes back in its own place and order."""

    def named(params: Sequence[jax.Array], pages: jax.Array, tokens: jax.Array, inputs: StepInput) -> tuple[jax.Array, jax.Array, Sampled]:
        made: tuple[jax.Array, jax.Array, Sampled] = step(params, pages, tokens, inputs)
        return made

    named.__name__ = named.__qualname__ = name
    return jax.jit(named, donate_argnums=(1, 2), out_shardings=(pool_format, None, None))


def known_tokens(inputs: StepInput, positions: jax.Array, tokens: jax.Array) -> jax.Array:
    """int32 [T]: the packed tokens, those that the host does not know from the table `tokens` [rows, max_model_len]."""
    rows = jnp.minimum(inputs.batch.token_rows(inputs.token_ids.shape[0]), inputs.rows.shape[0] - 1)
    return jnp.where(inputs.token_ids < 0, tokens[inputs.rows[rows], positions], inputs.token_ids)


def copy_pages(pages: jax.Array, copies: jax.Array, num_copies: jax.Array, num_layers: int) -> jax.Array:
    """The pool [L·P, G, 2·K·H] with pages copied over all layers, one after the other; in place when `pages` is donated.

    A loop of as many turns as there are copies: none cost nothing, and there is one page of temporaries, not a pool.

    Args:
      copies: int32 [S, 2], pages of one layer, from and to; those from `num_copies` on are ignored.
    """

    def copy(index: jax.Array, pool: jax.Array) -> jax.Array:
        page = lax.dynamic_slice_in_dim(pool, copies[index, 0], 1, axis=1)
        return lax.dynamic_update_slice_in_dim(pool, page, copies[index, 1], axis=1)

    by_layer = pages.reshape(num_layers, -1, *pages.shape[1:])
    return lax.fori_loop(0, num_copies, copy, by_layer).reshape(pages.shape)


def sample_rows(
    model: Any,
    hidden: jax.Array,
    inputs: StepInput,
    tokens: jax.Array,
    max_logprobs: int,
    vocabulary: Vocabulary = WHOLE,
    processors: Sequence[LogitsProcessor] = (),
) -> Sampled:
    """Logits and samples of the rows that need them: for a chunk in the middle of a prompt the head has nothing to do."""
    logits = model.logits(hidden, inputs.num_samples)

    def adjust(logits: jax.Array, positions: jax.Array, params: SamplingArrays) -> jax.Array:
        return adjust_logits(logits, positions, params, inputs.rules, tokens, processors, vocabulary)

    return sample(logits, inputs.sample_positions, inputs.sampling.unpack(), max_logprobs, vocabulary, adjust)
