"""Paged attention as a definition: short, slow, and the truth for every backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pjax.pallas_kernels.paged_attention.options import AttentionOptions, soft_capped
from pjax.pallas_kernels.paged_attention.ragged_batch import RaggedBatch
from pjax.pallas_kernels.pages import read_kv


def why_not(q: jax.Array, pages: jax.Array, options: AttentionOptions) -> str | None:
    """It takes everything."""
    return None


def attend(q: jax.Array, pages: jax.Array, batch: RaggedBatch, options: AttentionOptions) -> jax.Array:
    """Attention of each packed token over its own sequence's pages, by the definition.

    Query head `n` reads KV head `n // (N / K)`. A token at position `p` attends to positions
    `max(0, p - sliding_window + 1) .. p`. Computed in float32. See `paged_attention` for arguments.

    Returns [T, N, H]; zero for padding. Source: Kwon et al. 2023, section 4.1, equation 4.
    """
    num_tokens, num_heads, head_size = q.shape
    num_kv_heads, window = options.num_kv_heads, options.sliding_window
    group = num_heads // num_kv_heads
    rows = batch.token_rows(num_tokens)
    positions = batch.token_positions(num_tokens)
    real = rows < batch.num_rows
    kv = read_kv(pages, batch.block_tables, num_kv_heads).astype(jnp.float32)  # [S, W·G, 2, K, H]
    kv_positions = jnp.arange(kv.shape[1], dtype=jnp.int32)
    kv = jnp.where((kv_positions < batch.kv_lens[:, None])[:, :, None, None, None], kv, 0.0)
    kv = kv[jnp.minimum(rows, batch.num_rows - 1)]  # [T, W·G, 2, K, H]

    queries = q.reshape(num_tokens, num_kv_heads, group, head_size).astype(jnp.float32)
    logits = jnp.einsum("tkgh,tckh->tkgc", queries, kv[:, :, 0], precision="highest") * options.scale
    logits = soft_capped(logits, options.logit_softcap)
    seen = kv_positions <= positions[:, None]
    if window is not None:
        seen &= kv_positions > positions[:, None] - window
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    if options.sinks is not None:
        sinks = jnp.broadcast_to(options.sinks.astype(jnp.float32).reshape(num_kv_heads, group, 1), (*logits.shape[:-1], 1))
        logits = jnp.concatenate([logits, sinks], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., : kv.shape[1]]
    out = jnp.einsum("tkgc,tckh->tkgh", weights, kv[:, :, 1], precision="highest")
    out = jnp.where(real[:, None, None, None], out, 0.0)
    return out.reshape(num_tokens, num_heads, head_size).astype(q.dtype)
