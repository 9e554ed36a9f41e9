"""Attention over parts of the keys, joined."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def join_splits(out: jax.Array, lse: jax.Array) -> jax.Array:
    """The splits' outputs weighed by their parts of the softmax's sum (Dao et al. 2023, "Flash-Decoding").

    Args:
      out: [splits, ..., H]: each split's own attention.
      lse: float32 [splits, ...]: log2 of its sum of exponentials; -1e30 or so where it saw no key.

    Returns:
      [..., H]: float32, or what came in when there is one split.
    """
    if len(out) == 1:
        return out[0]
    weights = jnp.exp2(lse - lse.max(axis=0))
    return jnp.sum(weights[..., None] * out.astype(jnp.float32), axis=0) / weights.sum(axis=0)[..., None]
