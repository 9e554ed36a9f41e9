"""L equal layers, and the three ways to run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pjax.layers.kernels import ChosenKernel, Kernel, LayerKernels, groups_of
from pjax.layers.modules import Path, is_in, kernels_in, replace_at, taken_apart, with_arrays

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
