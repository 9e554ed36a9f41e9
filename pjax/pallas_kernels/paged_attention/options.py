"""What one call of paged attention computes, beside its arrays: every backend takes it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

NUMBERS = ("scale", "sliding_window", "logit_softcap")


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Made and checked by `api`. Static and hashable where it holds numbers alone; arrays may be traced."""

    num_kv_heads: int  # K
    scale: float | jax.Array  # multiplies the logits
    sliding_window: int | jax.Array | None = None  # tokens that a token sees, itself included
    logit_softcap: float | jax.Array | None = None  # logits become c · tanh(logits / c)
    sinks: jax.Array | None = None  # float [N], a logit of each head that has no value

    def why_not_numbers(self) -> str | None:
        """Why a kernel that takes numbers alone can't serve these, or None: it names the option."""
        arrays = [name for name in NUMBERS if isinstance(getattr(self, name), jax.Array)]
        if arrays:
            return f"takes {' and '.join(arrays)} as a number, not as an array"
        return None if self.sinks is None else "takes no sinks"


def soft_capped(logits: jax.Array, cap: float | jax.Array | None) -> jax.Array:
    """c · tanh(logits / c); the logits as they are where c is None or infinite."""
    if cap is None:
        return logits
    if not isinstance(cap, jax.Array):
        return cap * jnp.tanh(logits / cap)
    finite = jnp.where(jnp.isinf(cap), 1.0, cap)
    return jnp.where(jnp.isinf(cap), logits, finite * jnp.tanh(logits / finite))
