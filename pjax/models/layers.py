"""Layers that the model families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pjax.models.kernels import Axis, ChosenKernel, FloatKernel, Kernel, LayerKernels, groups_of
from pjax.models.modules import Path, is_in, kernels_in, replace_at, taken_apart, with_arrays


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


LAYER_MODES = ("unroll", "scan", "loop")


class LayerStack(nnx.Module):
    """L equal layers and one code for them, run in one of three ways (docs/decisions/0001-layers.md).

    unroll: the code L times over. Fastest on accelerators; compiles in the time of L layers.
    scan: once, over weights stacked on axis 0. Compiles in the time of one layer; reads each weight twice.
    loop: once, over the layers' own weights, each product choosing its kernel. For CPUs: compiles nearly as fast as
      scan and runs as fast as unroll.

    The layers' kernels may be of different kinds (`set_layers`). Scanned layers keep the kernels of such a product unstacked, and
    choose among them as the loop does.

    Args:
      make: a layer.
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

    def set_layers(self, layers: Sequence[nnx.Module]) -> None:
        """Puts other layers in the place of the stack's. They are equal but for the kinds of their kernels.

        Raises ValueError when there are not L of them, or they differ otherwise.
        """
        if len(layers) != self.num_layers:
            raise ValueError(f"there are {len(layers)} layers, but must be {self.num_layers}")
        choices, _ = taken_apart(layers)
        if self.mode != "scan":
            self.layers = nnx.List(layers)
            return
        mixed = {path: kernels for path, kernels in choices.items() if len(groups_of(kernels)) > 1}
        flat = [nnx.to_flat_state(nnx.state(layer)) for layer in layers]
        by_path = {path: [dict(arrays)[path].get_value() for arrays in flat] for path, _ in flat[0] if not is_in(path, mixed)}
        self.layers = with_arrays(layers[0], {path: jnp.stack(arrays) for path, arrays in by_path.items()})
        for path, kernels in mixed.items():
            replace_at(self.layers, path, LayerKernels(kernels))

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
        choices = {path: list(kernel.of_layer) for path, kernel in kernels_in(self.layers).items() if isinstance(kernel, LayerKernels)}
        flat = nnx.to_flat_state(nnx.state(self.layers))
        stacked = {path: leaf.get_value() for path, leaf in flat if not is_in(path, choices)}

        def layer_at(index: jax.Array) -> Any:
            layer = with_arrays(
                self.layers, {path: lax.dynamic_index_in_dim(array, index, keepdims=False) for path, array in stacked.items()}
            )
            return _choosing(layer, choices, index, None)

        return layer_at

    def _looped(self, num_tokens: jax.Array | None) -> Callable[[jax.Array], Any]:
        choices, others = taken_apart(self.layers)
        # Vectors (norms, biases) are small: stacking them costs less than a conditional each.
        stacked = {path: jnp.stack(arrays) for path, arrays in others.items() if arrays[0].ndim < 2}

        def array_at(path: Path, index: jax.Array) -> jax.Array:
            if path in stacked:
                return stacked[path][index]
            array: jax.Array = lax.switch(index, [partial(jnp.asarray, array) for array in others[path]])
            return array

        def layer_at(index: jax.Array) -> Any:
            layer = with_arrays(self.layers[0], {path: array_at(path, index) for path in others})
            return _choosing(layer, choices, index, num_tokens)

        return layer_at


def _choosing(layer: Any, choices: Mapping[Path, Sequence[Kernel]], index: jax.Array, num_rows: jax.Array | None) -> Any:
    """The layer, with the kernels of all layers in the place of its own."""
    for path, kernels in choices.items():
        replace_at(layer, path, ChosenKernel(kernels, index, num_rows))
    return layer
