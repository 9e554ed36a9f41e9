"""The forward program: tokens in, pages updated, logits out. Prefill and decode are the same program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from pjax.kv_cache.layout import KVCacheLayout
from pjax.layers.attention import PagedContext
from pjax.models.sharding import MODEL_AXIS, Shares
from pjax.runner.batch import ForwardInput
from pjax.sampling.prompt_logprobs import PromptScores, ScoredTokens, score_prompt
from pjax.sampling.vocabulary import WHOLE, Vocabulary

Params = Sequence[jax.Array]
"""The model's arrays as a flat list: flattening a module at each call costs more than a small step."""

ForwardOutput = tuple[jax.Array, jax.Array, jax.Array | None]
"""Pages; float32 logits [S, V] of the rows that are sampled; hidden states [T, D], None in buckets of decode rows alone."""

POOL_SPEC = PartitionSpec(None, None, MODEL_AXIS)
"""How a pool is divided over a mesh: each device's rows are those of its own KV heads, all keys and then all values."""

LOGITS_SPEC = PartitionSpec(None, MODEL_AXIS)
"""How logits are divided over a mesh: each device has those of its own part of the vocabulary."""


def make_forward(graph: Any, structure: Any, layout: KVCacheLayout, backend: str | None) -> Callable[..., ForwardOutput]:
    """The function `(params, pages, block_tables, tokens, inputs) -> ForwardOutput`.

    Block tables are int32 [groups, rows, W], tokens int32 [rows, max_model_len]: the tables that stay on the device.

    Args:
      graph, structure: of the model's NNX graph, and of the tree that `params` are the leaves of.
      layout: which layers share a page.
      backend: of attention; None takes the platform's.
    """

    def forward(params: Params, pages: jax.Array, block_tables: jax.Array, tokens: jax.Array, inputs: ForwardInput) -> ForwardOutput:
        model = nnx.merge(graph, jax.tree.unflatten(structure, params))
        pages = copy_pages(pages, inputs.copies, inputs.num_copies, layout.num_layers)
        tables = block_tables[:, inputs.rows]
        num_tokens = inputs.token_ids.shape[0]
        context = PagedContext.make(inputs.batch(tables[0]), pages, num_tokens, layout, backend, block_tables=tables)
        hidden, pages = model(known_tokens(inputs, context, tokens), pages, context)
        # Of a chunk in the middle of a prompt no row is sampled, and the head has nothing to do.
        logits = model.logits(hidden[inputs.sample_tokens], inputs.num_samples)
        return pages, logits, None if inputs.decode_only else hidden

    return forward


def make_score(graph: Any, structure: Any, vocabulary: Vocabulary = WHOLE) -> Callable[..., PromptScores]:
    """The function `(params, hidden, scored) -> PromptScores`, for hidden states [T, D] that the forward program gave."""

    def score(params: Params, hidden: jax.Array, scored: ScoredTokens) -> PromptScores:
        model = nnx.merge(graph, jax.tree.unflatten(structure, params))
        return score_prompt(model.logits, model.config.vocab_size, hidden, scored, vocabulary)

    return score


def shard_forward(forward: Callable[..., ForwardOutput], shares: Shares) -> Callable[..., ForwardOutput]:
    """One device's share of the forward program as a program of the mesh.

    Parameters, pages and logits are divided, all else is the same everywhere. What goes between devices is what the model says, and
    nothing else (docs/decisions/0009-tensor-parallel.md).
    """
    whole = PartitionSpec()
    ins, outs = (_param_specs(shares), POOL_SPEC, whole, whole, whole), (POOL_SPEC, LOGITS_SPEC, whole)
    return jax.shard_map(forward, mesh=shares.mesh, in_specs=ins, out_specs=outs, check_vma=False)


def shard_score(score: Callable[..., PromptScores], shares: Shares) -> Callable[..., PromptScores]:
    """As `shard_forward`, for scoring."""
    whole = PartitionSpec()
    return jax.shard_map(score, mesh=shares.mesh, in_specs=(_param_specs(shares), whole, whole), out_specs=whole, check_vma=False)


def _param_specs(shares: Shares) -> list[PartitionSpec]:
    return [leaf.sharding.spec for leaf in jax.tree.leaves(shares.abstract)]


def jit_forward(forward: Callable[..., ForwardOutput], pool_format: Any, name: str = "forward") -> Any:
    """The forward program, jitted under a name: the pool is given away and comes back in its own place and order."""

    def named(params: Params, pages: jax.Array, block_tables: jax.Array, tokens: jax.Array, inputs: ForwardInput) -> ForwardOutput:
        return forward(params, pages, block_tables, tokens, inputs)

    named.__name__ = named.__qualname__ = name
    return jax.jit(named, donate_argnums=1, out_shardings=(pool_format, None, None))


def jit_score(score: Callable[..., PromptScores], name: str = "score") -> Any:
    """The scoring program, jitted under a name."""

    def named(params: Params, hidden: jax.Array, scored: ScoredTokens) -> PromptScores:
        return score(params, hidden, scored)

    named.__name__ = named.__qualname__ = name
    return jax.jit(named)


def known_tokens(inputs: ForwardInput, context: PagedContext, tokens: jax.Array) -> jax.Array:
    """int32 [T]: the packed tokens, those that the host does not know from the table `tokens` [rows, max_model_len]."""
    rows = jnp.minimum(context.rows, inputs.rows.shape[0] - 1)
    return jnp.where(inputs.token_ids < 0, tokens[inputs.rows[rows], context.positions], inputs.token_ids)


def make_write_blocks(num_cells: int) -> Any:
    """The jitted function `(block_tables, changes) -> block_tables`, in place.

    `changes` are int32 [num_cells, 2]: flat index of a cell and the page id that it gets; indices past the end are padding.
    """

    def write_blocks(block_tables: jax.Array, changes: jax.Array) -> jax.Array:
        flat = block_tables.reshape(-1).at[changes[:, 0]].set(changes[:, 1], mode="drop")
        return flat.reshape(block_tables.shape)

    write_blocks.__name__ = write_blocks.__qualname__ = f"write_blocks_{num_cells}"
    return jax.jit(write_blocks, donate_argnums=0)


def copy_pages(pages: jax.Array, copies: jax.Array, num_copies: jax.Array, num_layers: int) -> jax.Array:
    """The pool [L·P, G, 2·K·H] with pages copied over all layers, one after the other; in place when `pages` is donated.

    A loop of as many turns as there are copies: none cost nothing, and there is one page of temporaries, not a pool.

    Args:
      copies: int32 [S · groups, 2], pages of one layer, from and to; those from `num_copies` on are ignored.
    """

    def copy(index: jax.Array, pool: jax.Array) -> jax.Array:
        page = lax.dynamic_slice_in_dim(pool, copies[index, 0], 1, axis=1)
        return lax.dynamic_update_slice_in_dim(pool, page, copies[index, 1], axis=1)

    by_layer = pages.reshape(num_layers, -1, *pages.shape[1:])
    return lax.fori_loop(0, num_copies, copy, by_layer).reshape(pages.shape)
