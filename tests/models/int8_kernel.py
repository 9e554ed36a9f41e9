"""A kind of kernel from outside pjax: int8 with a scale for each row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from pjax.layers.kernels import FloatKernel, Kernel


class Int8Kernel(nnx.Module, Kernel):
    """Weights are values · scales."""

    def __init__(self, values: jax.Array, scales: jax.Array, axes: Any = (None, None)) -> None:
        self.values = nnx.Param(values, axes=axes)  # int8 [out, in]
        self.scales = nnx.Param(scales, axes=axes[:1])  # float32 [out]

    @property
    def shape(self) -> Any:
        return self.values.shape

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def axes(self) -> Any:
        return self.values.get_metadata("axes")

    def matmul(self, x: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        y = lax.dot_general(x, self.values[...].astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return y * self.scales[...]


def quantised(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [out, in] and float32 [out]."""
    scales = (np.abs(weights).max(axis=1) / 127).astype(np.float32)
    return np.round(weights / scales[:, None]).astype(np.int8), scales


def as_int8(kernel: FloatKernel) -> Int8Kernel:
    values, scales = map(jnp.asarray, quantised(np.asarray(kernel[...])))
    return Int8Kernel(values, scales, kernel.axes)
