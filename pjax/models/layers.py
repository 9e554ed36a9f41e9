"""Layers that the model families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pjax.pallas_kernels.products import is_native, product

Axis = str | tuple[tuple[str, int], ...] | None
"""The logical axis of one dimension of a parameter: a name, or several side by side with their sizes; None is whole everywhere.

`pjax.models.sharding` says which of them are divided among devices.
"""


@dataclass(frozen=True, eq=False)
class LayerChoice:
    """The kernels of one product in every layer, and whose turn it is: what a looped layer sees as its kernel.

    `matmul` reads one where it lies; indexing stacked kernels would copy it.
    """

    kernels: tuple[jax.Array, ...]  # L of [out, in]
    index: jax.Array  # int32 []
    num_tokens: jax.Array | None  # int32 [], how many rows are tokens; None: all

    def __getitem__(self, _: Any) -> LayerChoice:
        return self  # so that `Param[...]` gives the choice


def matmul(x: jax.Array, kernel: jax.Array | LayerChoice) -> jax.Array:
    """x [T, in] · kernel [out, in] transposed: float32 [T, out]."""
    return product(x, kernel.kernels, kernel.index, kernel.num_tokens) if isinstance(kernel, LayerChoice) else product(x, [kernel])


class Linear(nnx.Module):
    """y = x · kernelᵀ + bias, accumulated in float32. Kernels are [out, in], as checkpoints have them.

    `axes` are the logical axes of out and in. Where the latter is divided among devices, each has a part of the sum:
    `sum_over` is the mesh's axis that they are added over.
    """

    def __init__(self, num_in: int, num_out: int, *, bias: bool = False, axes: tuple[Axis, Axis] = (None, None), dtype: Any) -> None:
        self.kernel = nnx.Param(jnp.zeros((num_out, num_in), dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((num_out,), dtype), axes=axes[:1]) if bias else None
        self.sum_over: str | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, in] to [T, out]."""
        y = matmul(x, self.kernel[...])
        if self.sum_over is not None:
            y = lax.psum(y.astype(x.dtype), self.sum_over).astype(jnp.float32)
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
        self.table = nnx.Param(jnp.zeros((num_rows, size), dtype), axes=(axis, "embed"))
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
    kernel = (embed.table if head is None else head.kernel)[...]
    if num_rows is None:
        return matmul(x, kernel)
    if not is_native(x, kernel):
        return _some_logits(x, kernel, num_rows)

    def native(x: jax.Array, kernel: jax.Array, num_rows: jax.Array) -> jax.Array:
        return product(x, [kernel], 0, num_rows)

    return lax.platform_dependent(x, kernel, num_rows, cpu=native, default=_some_logits)


def _some_logits(x: jax.Array, kernel: jax.Array, num_rows: jax.Array) -> jax.Array:
    count = x.shape[0]
    sizes = [size for size in HEAD_ROWS if size < count] + [count]

    def branch(size: int) -> Callable[[], jax.Array]:
        return lambda: jnp.pad(matmul(x[:size], kernel), ((0, count - size), (0, 0)))

    if len(sizes) == 1:
        return branch(count)()
    which = jnp.searchsorted(jnp.array(sizes, jnp.int32), num_rows)
    logits: jax.Array = lax.switch(which.astype(jnp.int32), [branch(size) for size in sizes])
    return logits


LAYER_MODES = ("unroll", "scan", "loop")


class LayerStack(nnx.Module):
    """L equal layers and one code for them, run in one of three ways (docs/decisions/0001-layers.md).

    unroll: the code L times over. Fastest on accelerators; compiles in the time of L layers.
    scan: once, over weights stacked on axis 0. Compiles in the time of one layer; reads each weight twice.
    loop: once, over the layers' own weights, each product choosing its kernel. For CPUs: compiles nearly as fast as
      scan and runs as fast as unroll.

    Args:
      rows_are_tokens: a promise that the rows of every product of a layer are the step's T tokens in their order. Then the loop's
        native products leave out those that are padding, of which `context`, the first of `shared`, knows the number.
    """

    def __init__(self, make: Callable[[], nnx.Module], num_layers: int, *, mode: str, rows_are_tokens: bool = False) -> None:
        self.num_layers = num_layers
        self.mode = mode
        self.rows_are_tokens = rows_are_tokens
        if mode == "scan":
            graph, state = nnx.split(make())
            stacked = jax.tree.map(lambda leaf: jnp.zeros((num_layers, *leaf.shape), leaf.dtype), state)
            self.layers: Any = nnx.merge(graph, stacked)
        else:
            self.layers = nnx.List([make() for _ in range(num_layers)])

    def __call__(self, x: jax.Array, pages: jax.Array, *shared: Any) -> tuple[jax.Array, jax.Array]:
        """Runs `x, pages = layer(x, pages, layer_index, *shared)` for each layer in turn."""
        if self.mode == "unroll":
            for index, layer in enumerate(self.layers):
                x, pages = layer(x, pages, index, *shared)
            return x, pages
        layer_at = self._scanned() if self.mode == "scan" else self._looped(shared[0].num_tokens if self.rows_are_tokens else None)

        def step(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            return layer_at(index)(*carry, index, *shared), None

        return lax.scan(step, (x, pages), jnp.arange(self.num_layers, dtype=jnp.int32))[0]

    def _scanned(self) -> Callable[[jax.Array], Any]:
        graph, stacked = nnx.split(self.layers)
        return lambda index: nnx.merge(graph, jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), stacked))

    def _looped(self, num_tokens: jax.Array | None) -> Callable[[jax.Array], Any]:
        split = [nnx.split(layer) for layer in self.layers]
        graph, structure = split[0][0], jax.tree.structure(split[0][1])
        by_leaf = list(zip(*(jax.tree.leaves(state) for _, state in split), strict=True))
        # Vectors (norms, biases) are small: stacking them costs less than a conditional each.
        stacked = [jnp.stack(leaves) if leaves[0].ndim < 2 else leaves for leaves in by_leaf]

        def layer_at(index: jax.Array) -> Any:
            leaves = [LayerChoice(leaf, index, num_tokens) if isinstance(leaf, tuple) else leaf[index] for leaf in stacked]
            return nnx.merge(graph, jax.tree.unflatten(structure, leaves))

        return layer_at
