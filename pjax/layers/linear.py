"""Linear layers, the embedding, the MLP and the head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pjax.layers.kernels import Axis, FloatKernel, Kernel


class Linear(nnx.Module):
    """y = x · kernelᵀ + bias, accumulated in float32. `kernel` is a `Kernel` [out, in] of any kind; a `FloatKernel` at first.

    `axes` are the logical axes of out and in. Where the latter is divided among devices, each has a part of the sum:
    `sum_over` is the mesh's axis that they are added over.
    """

    def __init__(self, num_in: int, num_out: int, *, bias: bool = False, axes: tuple[Axis, Axis] = (None, None), dtype: Any) -> None:
        self.kernel: Kernel = FloatKernel(jnp.zeros((num_out, num_in), dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((num_out,), dtype), axes=axes[:1]) if bias else None
        self.sum_over: str | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, in] to [T, out]."""
        y = self.kernel.matmul(x)
        if self.sum_over is not None:
            y = lax.psum(y.astype(x.dtype), self.sum_over).astype(jnp.float32)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,  # these three are one formula, with tanh
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
}
"""By their names in Hugging Face configs."""


class MLP(nnx.Module):
    """down(act(up(x)))."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: str, bias: bool, dtype: Any) -> None:
        self.activation = activation
        self.up = Linear(hidden_size, intermediate_size, bias=bias, axes=("ffn", "embed"), dtype=dtype)
        self.down = Linear(intermediate_size, hidden_size, bias=bias, axes=("embed", "ffn"), dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, D] to [T, D]."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class Embedding(nnx.Module):
    """A table [V, D], which `head_logits` takes as a tied head.

    `axis` is the logical axis of its rows. Where they are divided among devices, each looks up those that it has:
    `sum_over` is the mesh's axis that they are added over.
    """

    def __init__(self, num_rows: int, size: int, *, axis: Axis = None, dtype: Any) -> None:
        self.table = FloatKernel(jnp.zeros((num_rows, size), dtype), axes=(axis, "embed"))
        self.sum_over: str | None = None

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int32 [T] to [T, D]. Ids out of range (padding) are clipped."""
        table = self.table[...]
        if self.sum_over is None:
            return table.at[ids].get(mode="clip")
        ids = ids - lax.axis_index(self.sum_over) * len(table)
        mine = (ids >= 0) & (ids < len(table))
        return lax.psum(jnp.where(mine[:, None], table.at[ids].get(mode="clip"), 0), self.sum_over)


HEAD_ROWS = (1, 4, 16, 64)  # where XLA makes the logits, it does for the first of these that holds the rows that count


def head_logits(x: jax.Array, head: Linear | None, embed: Embedding, num_rows: jax.Array | None = None) -> jax.Array:
    """[S, D] to float32 logits [S, V], by the head or, where it is tied (None), by the embedding.

    Args:
      num_rows: int32 [], how many rows count, by default all; logits of others may be zeros.
    """
    kernel: Kernel = embed.table if head is None else head.kernel
    if num_rows is None:
        return kernel.matmul(x)
    if not kernel.skips_rows(x):
        return _some_logits(x, kernel, num_rows)
    return lax.platform_dependent(
        cpu=lambda: kernel.matmul(x, num_rows),
        default=lambda: _some_logits(x, kernel, num_rows),
    )


def _some_logits(x: jax.Array, kernel: Kernel, num_rows: jax.Array) -> jax.Array:
    count = x.shape[0]
    sizes = [size for size in HEAD_ROWS if size < count] + [count]

    def branch(size: int) -> Callable[[], jax.Array]:
        return lambda: jnp.pad(kernel.matmul(x[:size]), ((0, count - size), (0, 0)))

    if len(sizes) == 1:
        return branch(count)()
    which = jnp.searchsorted(jnp.array(sizes, jnp.int32), num_rows)
    logits: jax.Array = lax.switch(which.astype(jnp.int32), [branch(size) for size in sizes])
    return logits
