"""Layers that the model families share. Weights are stored [in, out]: XLA's CPU products are fastest so in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


class Linear(nnx.Module):
    """y = x · kernel + bias, accumulated in float32."""

    def __init__(self, num_in: int, num_out: int, *, bias: bool = False, dtype: Any) -> None:
        self.kernel = nnx.Param(jnp.zeros((num_in, num_out), dtype))
        self.bias = nnx.Param(jnp.zeros((num_out,), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] to [..., out]."""
        y = jnp.matmul(x, self.kernel[...], preferred_element_type=jnp.float32)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, *, epsilon: float, dtype: Any) -> None:
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., D]."""
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (self.scale[...] * wide.astype(x.dtype)).astype(x.dtype)


class Embedding(nnx.Module):
    """A table [V, D]; `attend` uses it as a tied head."""

    def __init__(self, num_rows: int, size: int, *, dtype: Any) -> None:
        self.table = nnx.Param(jnp.zeros((num_rows, size), dtype))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int32 [T] to [T, D]. Ids out of range (padding) are clipped."""
        return self.table[...].at[ids].get(mode="clip")

    def attend(self, x: jax.Array) -> jax.Array:
        """[..., D] to float32 logits [..., V]."""
        return lax.dot_general(x, self.table[...], (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


class LayerStack(nnx.Module):
    """L equal layers, run unrolled (a list of modules) or scanned (one module whose weights are stacked on axis 0).

    Unrolled runs faster; scanned compiles in the time of one layer (docs/decisions/0001-layers.md).
    """

    def __init__(self, make: Callable[[], nnx.Module], num_layers: int, *, scan: bool) -> None:
        self.num_layers = num_layers
        self.scan = scan
        if scan:
            graph, state = nnx.split(make())
            stacked = jax.tree.map(lambda leaf: jnp.zeros((num_layers, *leaf.shape), leaf.dtype), state)
            self.layers: Any = nnx.merge(graph, stacked)
        else:
            self.layers = nnx.List([make() for _ in range(num_layers)])

    def __call__(self, body: Callable[[Any, Any, int | jax.Array], Any], carry: Any) -> Any:
        """Runs `carry = body(layer, carry, layer_index)` for each layer in turn."""
        if not self.scan:
            for index, layer in enumerate(self.layers):
                carry = body(layer, carry, index)
            return carry
        graph, stacked = nnx.split(self.layers)

        def step(carry: Any, xs: tuple[Any, jax.Array]) -> tuple[Any, None]:
            state, index = xs
            return body(nnx.merge(graph, state), carry, index), None

        carry, _ = lax.scan(step, carry, (stacked, jnp.arange(self.num_layers, dtype=jnp.int32)))
        return carry
