"""A model without pages: logits of whole sequences, for scoring and training. Differentiable."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjax.layers.attention import PLAIN, LayerOptions, RowContext

MASKED = -1e30


@dataclass(frozen=True, kw_only=True)
class DenseContext(RowContext):
    """Stands where `PagedContext` does: B sequences of S tokens each, causal attention over their own, no cache."""

    positions: jax.Array  # int32 [B·S]
    length: int  # S
    num_tokens: None = None  # all count

    def attend(
        self, pages: Any, q: jax.Array, k: jax.Array, v: jax.Array, layer: int | jax.Array, options: LayerOptions = PLAIN
    ) -> tuple[jax.Array, Any]:
        """q [B·S, N, H], k and v [B·S, K, H] to ([B·S, N, H], pages as they are). Softmax in float32."""
        return options.apply(layer, partial(self._attend, q, k, v)), pages

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        scale: float | None,
        sliding_window: int | None,
        logit_softcap: float | None,
        sinks: jax.Array | None,
    ) -> jax.Array:
        num_heads, head_size = q.shape[1:]
        num_kv_heads = k.shape[1]
        queries = q.reshape(-1, self.length, num_kv_heads, num_heads // num_kv_heads, head_size)
        keys, values = (x.reshape(-1, self.length, num_kv_heads, head_size) for x in (k, v))
        logits = jnp.einsum("bskrh,btkh->bkrst", queries, keys, preferred_element_type=jnp.float32)
        logits = logits * (head_size**-0.5 if scale is None else scale)
        if logit_softcap is not None:
            logits = logit_softcap * jnp.tanh(logits / logit_softcap)
        distance = jnp.arange(self.length)[:, None] - jnp.arange(self.length)
        seen = (distance >= 0) if sliding_window is None else (distance >= 0) & (distance < sliding_window)
        logits = jnp.where(seen, logits, MASKED)
        if sinks is not None:
            column = sinks.astype(jnp.float32).reshape(1, num_kv_heads, -1, 1, 1)
            logits = jnp.concatenate([logits, jnp.broadcast_to(column, (*logits.shape[:-1], 1))], axis=-1)
        weights = jax.nn.softmax(logits, axis=-1)[..., : self.length].astype(v.dtype)
        out = jnp.einsum("bkrst,btkh->bskrh", weights, values, preferred_element_type=jnp.float32)
        return out.astype(q.dtype).reshape(q.shape)


def forward(model: Any, token_ids: jax.Array) -> jax.Array:
    """Logits after every token, float32 [B, S, V].

    Sequences that are shorter are padded on the right, with any token: a token sees only those before it.

    Args:
      model: an NNX module of pjax, as `pjax.models.load` gives it.
      token_ids: int32 [B, S], S at most `model.config.max_position`.

    Raises:
      ValueError: token_ids has another shape, or is too long.
    """
    if token_ids.ndim != 2 or token_ids.shape[1] > model.config.max_position:
        raise ValueError(f"token_ids has shape {list(token_ids.shape)}, but must be [B, S] with S at most {model.config.max_position}")
    num_sequences, length = token_ids.shape
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), num_sequences)
    rows = np.repeat(np.arange(num_sequences, dtype=np.int32), length)
    context = DenseContext(positions=positions, length=length, rows=jnp.asarray(rows))
    hidden, _ = model(token_ids.reshape(-1).astype(jnp.int32), jnp.zeros((0,), jnp.float32), context)
    logits: jax.Array = model.logits(hidden)
    return logits.reshape(num_sequences, length, -1)
