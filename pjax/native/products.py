"""Products with weights as checkpoints have them, [out, in]; by a native kernel on CPUs (docs/decisions/0013-native-products.md)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pjax import native

FEW_ROWS = 128  # up to here a CPU's product by XLA is faster with the weights on the left
FEW_ROWS_BF16 = 8  # up to here memory is the bound, and bfloat16 units of a CPU are no help


def product(x: jax.Array, kernels: Sequence[jax.Array], index: int | jax.Array = 0, num_rows: int | jax.Array | None = None) -> jax.Array:
    """x [T, in] times one of the kernels [out, in], transposed: float32 [T, out]. Differentiable.

    Args:
      kernels: of equal shape and dtype; the chosen one is read where it lies, the others not at all.
      index: int32 [], which of them.
      num_rows: int32 [], how many rows of x count, by default all. The others are padding, whatever they hold: they become zeros and
        have no part in gradients. The native kernel skips them.
    """
    if not is_native(x, kernels[0]):
        return _by_xla(x, tuple(kernels), index, num_rows)
    count = jnp.asarray(x.shape[0] if num_rows is None else num_rows, jnp.int32)

    def elsewhere(x: jax.Array, kernels: tuple[jax.Array, ...], index: jax.Array, count: jax.Array) -> jax.Array:
        return _by_xla(x, kernels, index, None if num_rows is None else count)

    return lax.platform_dependent(x, tuple(kernels), jnp.asarray(index, jnp.int32), count, cpu=_native, default=elsewhere)


def is_native(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether the native kernel takes these and is there: then it is used on CPUs."""
    dtypes = (jnp.float32, jnp.bfloat16)
    if x.dtype not in dtypes or kernel.dtype not in dtypes or 0 in x.shape or native.library() is None:
        return False
    return not (kernel.dtype == jnp.bfloat16 and x.shape[0] > FEW_ROWS_BF16 and _has_bfloat16_units())


def _has_bfloat16_units() -> bool:
    """Whether the CPU multiplies bfloat16 by itself: then XLA's products of many rows are faster."""
    library = native.library()
    return library is not None and bool(library.PjaxHasBfloat16Units())


@jax.custom_jvp
def _native(x: jax.Array, kernels: tuple[jax.Array, ...], index: jax.Array, num_rows: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct((x.shape[0], kernels[0].shape[0]), jnp.float32)
    call = jax.ffi.ffi_call(native.PRODUCT, shape, vmap_method="sequential")
    y: jax.Array = call(x, index, num_rows, *kernels)
    return y


@_native.defjvp
def _native_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, kernels, index, num_rows = primals
    dx, dkernels, *_ = tangents
    counts = jnp.arange(x.shape[0])[:, None] < num_rows
    change = _by_xla(jnp.where(counts, dx, 0), kernels, index) + _by_xla(jnp.where(counts, x, 0), dkernels, index)
    return _native(x, kernels, index, num_rows), change


def _by_xla(x: jax.Array, kernels: tuple[jax.Array, ...], index: int | jax.Array, num_rows: int | jax.Array | None = None) -> jax.Array:
    if num_rows is not None:
        x = jnp.where(jnp.arange(x.shape[0])[:, None] < num_rows, x, 0)
    if len(kernels) == 1:
        return _product(kernels[0], x)
    # A conditional reads the kernel where it lies; indexing stacked kernels would copy it.
    return lax.switch(index, [partial(_product, one) for one in kernels], x)


def _product(kernel: jax.Array, x: jax.Array) -> jax.Array:
    if 1 < x.shape[0] <= FEW_ROWS:
        return lax.platform_dependent(kernel, x, cpu=_weights_left, default=_weights_right)
    return _weights_right(kernel, x)


def _weights_right(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return lax.dot_general(x, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _weights_left(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """For CPUs: XLA packs a product's right side and streams its left one, and weights should be read once.

    The barrier keeps XLA from turning it round again (docs/decisions/0002-cpu-products.md).
    """
    y = lax.dot_general(kernel, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return lax.optimization_barrier(y).T
