"""Normalisations, computed in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


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


class LayerNorm(nnx.Module):
    """(x - mean) / deviation · scale + bias, in float32 (Ba et al. 2016); without scale and bias where `affine` is false."""

    def __init__(self, size: int, *, epsilon: float, affine: bool = True, dtype: Any) -> None:
        self.scale = nnx.Param(jnp.ones((size,), dtype)) if affine else None
        self.bias = nnx.Param(jnp.zeros((size,), dtype)) if affine else None
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., D]."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        if self.scale is not None and self.bias is not None:
            wide = wide * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return wide.astype(x.dtype)
