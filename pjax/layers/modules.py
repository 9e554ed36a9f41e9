"""Modules of NNX taken apart into kernels and other arrays, and put together again."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from pjax.layers.kernels import Kernel

Path = tuple[Any, ...]
"""Names of attributes and numbers in lists, from a module down."""


def parts_of(module: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every kernel and every other NNX variable of a module, with its path; no part of a kernel by itself."""
    for name, child in nnx.iter_children(module):
        where = (*path, name)
        if isinstance(child, Kernel | nnx.Variable):
            yield where, child
        else:
            yield from parts_of(child, where)


def kernels_in(module: Any) -> dict[Path, Kernel]:
    """Every kernel of a module by its path. Kernels that are parts of another are not there by themselves."""
    return {path: part for path, part in parts_of(module) if isinstance(part, Kernel)}


def replace_at(module: Any, path: Path, kernel: Any) -> None:
    """Puts a kernel where `kernels_in` found one, in place."""
    for name in path[:-1]:
        module = _child(module, name)
    if isinstance(path[-1], int):
        module[path[-1]] = kernel
    else:
        setattr(module, path[-1], nnx.data(kernel))


def _child(module: Any, name: Any) -> Any:
    return module[name] if isinstance(name, int) else getattr(module, name)


def is_in(path: Path, others: Container[Path]) -> bool:
    """Whether a path is among `others` or below one of them."""
    return any(path[:length] in others for length in range(1, len(path) + 1))


def with_arrays(module: Any, arrays: Mapping[Path, jax.Array]) -> Any:
    """A copy of a module with other arrays at some paths; all else is shared."""
    graph, state = nnx.split(module)
    flat = [(path, leaf.replace(arrays[path]) if path in arrays else leaf) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def taken_apart(layers: Sequence[Any]) -> tuple[dict[Path, list[Kernel]], dict[Path, list[jax.Array]]]:
    """The kernels that layers have at each path, and the arrays that belong to none: one for each layer.

    Raises ValueError, with the path, when the layers differ in more than the kinds of their kernels.
    """
    parts = [dict(parts_of(layer)) for layer in layers]
    for number, own in enumerate(parts):
        for path in parts[0] | own:
            shapes = [list(of[path].shape) if path in of else "nothing" for of in (parts[0], own)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"layer {number} has {shapes[1]} at {'.'.join(map(str, path))}, but layer 0 has {shapes[0]}")
    kernels, arrays = dict[Path, list[Kernel]](), dict[Path, list[jax.Array]]()
    for path, part in parts[0].items():
        if isinstance(part, Kernel):
            kernels[path] = [of[path] for of in parts]
        else:
            arrays[path] = [of[path].get_value() for of in parts]
    return kernels, arrays
