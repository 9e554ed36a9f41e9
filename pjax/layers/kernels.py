"""Kernels: the weights of products, in whatever form they are kept (docs/decisions/0017-kernels-as-pytrees.md).

A kind of kernel is one class. It holds its arrays, multiplies with them, and says how they are divided among devices. `Linear`,
`LayerStack`, `head_logits`, loading and sharding know only what `Kernel` has.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from pjax.native.products import is_native, product

Axis = str | tuple[tuple[str, int], ...] | None
"""The logical axis of one dimension of a parameter: a name, or several side by side with their sizes; None is whole everywhere.

`pjax.models.sharding` says which of them are divided among devices.
"""


class Kernel:
    """The weights of one product, [out, in]: what every kind of kernel has.

    A kind is a subclass that is an NNX node too, so a pytree: an `nnx.Module` whose arrays are `nnx.Param`s, each with its own `axes`
    as metadata, or a single `nnx.Param`. Its arrays are parameters by the kernel's name and theirs (`head.kernel.scales`).
    """

    __slots__ = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the product."""
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        """The type that most of the weights are kept in."""
        raise NotImplementedError

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """The logical axes of out and in."""
        raise NotImplementedError

    def matmul(self, x: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        """x [T, in] to float32 [T, out].

        Args:
          num_rows: int32 [], how many rows of x count, by default all. What becomes of the others is undefined, but finite where x is.
        """
        raise NotImplementedError

    def skips_rows(self, x: jax.Array) -> bool:
        """Whether on a CPU `matmul` of an `x` like this one does no work for rows that do not count."""
        return False

    @classmethod
    def matmul_at(cls, kernels: Sequence[Self], index: jax.Array, x: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        """`matmul` with one of several kernels whose arrays have equal shapes and types; the others are not read.

        Args:
          index: int32 [], which of them.
        """
        # A conditional reads the kernel where it lies; indexing stacked kernels would copy it.
        return lax.switch(index, [partial(kernel.matmul, num_rows=num_rows) for kernel in kernels], x)


class FloatKernel(nnx.Param[jax.Array], Kernel):
    """One floating array [out, in], as checkpoints have it. `axes` is its metadata: `FloatKernel(array, axes=(out, in))`."""

    @property
    def shape(self) -> Any:
        """Shape of the array."""
        return self.get_value().shape

    @property
    def dtype(self) -> Any:
        """Type of the array."""
        return self.get_value().dtype

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Its metadata; (None, None) where it has none."""
        axes: tuple[Axis, Axis] = self.get_metadata("axes", (None, None))
        return axes

    def matmul(self, x: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        """See `Kernel`; rows that do not count become zeros. Differentiable."""
        return product(x, [self.get_value()], 0, num_rows)

    def skips_rows(self, x: jax.Array) -> bool:
        """Where the native kernel multiplies."""
        return is_native(x, self.get_value())

    @classmethod
    def matmul_at(cls, kernels: Sequence[Self], index: jax.Array, x: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        """See `Kernel`."""
        return product(x, [kernel.get_value() for kernel in kernels], index, num_rows)


class SideBySide(nnx.Module, Kernel):
    """Kernels of several kinds whose outputs stand side by side: queries, keys and values, say. Made by `side_by_side`."""

    def __init__(self, parts: Sequence[Kernel]) -> None:
        self.parts = nnx.List(parts)

    @property
    def shape(self) -> tuple[int, int]:
        """The parts' outs, added up, and their in."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def dtype(self) -> Any:
        """Type of the largest part."""
        return max(self.parts, key=lambda part: part.shape[0]).dtype

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """The parts' axes one after the other; None where a part of them has none."""
        sections = [_sections(part) for part in self.parts]
        out = None if None in sections else tuple(one for some in sections for one in some or ())
        return out, self.parts[0].axes[1]

    def matmul(self, x: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        """See `Kernel`."""
        return jnp.concatenate([part.matmul(x, num_rows) for part in self.parts], axis=-1)

    def skips_rows(self, x: jax.Array) -> bool:
        """Where every part does."""
        return all(part.skips_rows(x) for part in self.parts)

    @classmethod
    def matmul_at(cls, kernels: Sequence[Self], index: jax.Array, x: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        """See `Kernel`; each part by its own kind."""
        by_part = zip(*(kernel.parts for kernel in kernels), strict=True)
        return jnp.concatenate([type(parts[0]).matmul_at(parts, index, x, num_rows) for parts in by_part], axis=-1)


def side_by_side(kernels: Sequence[Kernel]) -> Kernel:
    """One kernel [sum of outs, in] of several: a single array where all are floats of one type, else a `SideBySide`.

    Raises ValueError when they have not all the same `in` and its axis.
    """
    if len({(kernel.shape[1], kernel.axes[1]) for kernel in kernels}) != 1:
        shown = ", ".join(f"{list(kernel.shape)} with axis {kernel.axes[1]!r}" for kernel in kernels)
        raise ValueError(f"kernels side by side are {shown}, but must have one size and axis of in")
    joined = SideBySide(kernels)
    arrays = [kernel.get_value() for kernel in kernels if isinstance(kernel, FloatKernel) and kernel.dtype == kernels[0].dtype]
    return FloatKernel(jnp.concatenate(arrays), axes=joined.axes) if len(arrays) == len(kernels) else joined


def _sections(kernel: Kernel) -> tuple[tuple[str, int], ...] | None:
    axis = kernel.axes[0]
    return ((axis, kernel.shape[0]),) if isinstance(axis, str) else axis


class LayerKernels(nnx.Module, Kernel):
    """The kernels of one product in all layers where they can't be stacked, being of several kinds: a scanned layer holds them.

    It multiplies when a layer is chosen, as a `ChosenKernel`.
    """

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        self.of_layer = nnx.List(kernels)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of every layer's kernel."""
        return self.of_layer[0].shape

    @property
    def dtype(self) -> Any:
        """Type of the first layer's kernel."""
        return self.of_layer[0].dtype

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Axes of the first layer's kernel."""
        return self.of_layer[0].axes


class ChosenKernel(Kernel):
    """One of the kernels that a product has in the layers, by a traced index: what the one code of all layers sees.

    It is read where it lies. Kernels are grouped by kind, shape and type; each group multiplies in its own way.

    Args:
      kernels: one for each layer.
      index: int32 [], the layer.
      num_rows: int32 [], how many rows count where `matmul` is not told.
    """

    __slots__ = ("_groups", "_index", "_kernels", "_num_rows")

    def __init__(self, kernels: Sequence[Kernel], index: jax.Array, num_rows: jax.Array | None = None) -> None:
        self._kernels, self._index, self._num_rows = kernels, index, num_rows
        self._groups = groups_of(kernels)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of every layer's kernel."""
        return self._kernels[0].shape

    @property
    def dtype(self) -> Any:
        """Type of the first layer's kernel."""
        return self._kernels[0].dtype

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Axes of the first layer's kernel."""
        return self._kernels[0].axes

    def matmul(self, x: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        """See `Kernel`."""
        num_rows = self._num_rows if num_rows is None else num_rows

        def of_group(group: list[int], place: jax.Array) -> jax.Array:
            kernels = [self._kernels[layer] for layer in group]
            if len(kernels) == 1:
                return kernels[0].matmul(x, num_rows)
            return type(kernels[0]).matmul_at(kernels, place, x, num_rows)

        if len(self._groups) == 1:
            return of_group(self._groups[0], self._index)
        which, places = np.zeros(len(self._kernels), np.int32), np.zeros(len(self._kernels), np.int32)
        for number, group in enumerate(self._groups):
            which[group], places[group] = number, np.arange(len(group))
        branches = [partial(of_group, group) for group in self._groups]
        return lax.switch(jnp.asarray(which)[self._index], branches, jnp.asarray(places)[self._index])


def groups_of(kernels: Sequence[Kernel]) -> list[list[int]]:
    """The places of kernels of one kind, whose arrays have equal shapes and types, together: in the order of the first of each."""
    groups: list[tuple[Any, list[int]]] = []
    for place, kernel in enumerate(kernels):
        leaves, structure = jax.tree.flatten(kernel)
        kind = (type(kernel), structure, [(leaf.shape, leaf.dtype) for leaf in leaves])
        for other, places in groups:
            if other == kind:
                places.append(place)
                break
        else:
            groups.append((kind, [place]))
    return [places for _, places in groups]
