"""Parameters that the caller holds on the device already: used where they are, never copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pjax.checkpoints.weights import warn_of
from pjax.errors import ConfigError
from pjax.layers.kernels import FloatKernel
from pjax.layers.modules import is_in, kernels_in
from pjax.models import ModelSource

MAX_SHOWN = 5


def source_of(model: Any) -> ModelSource:
    """A module of pjax with its parameters, as `open_model` gives a checkpoint; `load` gives the module's own arrays.

    Raises ConfigError when it is no such module, or its parameters have several types.
    """
    if not isinstance(model, nnx.Module) or not hasattr(model, "config"):
        raise ConfigError(f"model is {type(model).__name__}, but must be a path, a hub id or a model of pjax (see pjax.models.load)")
    graph, state = nnx.split(model)
    # Kernels of other kinds have arrays of what types they like.
    others = {path for path, kernel in kernels_in(model).items() if not isinstance(kernel, FloatKernel)}
    dtypes = sorted({str(leaf.dtype) for path, leaf in nnx.to_flat_state(state) if not is_in(path, others)})
    if len(dtypes) != 1:
        raise ConfigError(f"the model's parameters are {', '.join(dtypes)}, but must be of one type")
    return ModelSource(
        config=model.config,
        graph=graph,
        abstract=jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state),
        eos_token_ids=(),
        path=Path(type(model).__name__),
        dtype=dtypes[0],
        read_weights=lambda progress, shardings: state,
    )


def match(abstract: Any, params: Any) -> Any:
    """The parameters as a state like `abstract`: of a module, a state, or a tree of dictionaries with its names.

    Waits for them, and names those with NaN or infinite values in a warning: a pass over them on their devices.

    Raises ConfigError that names the parameters that are missing, too many, or of another shape, type or, in a mesh, place.
    """
    if isinstance(params, nnx.Module):
        params = nnx.state(params)
    found = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    wanted = jax.tree.leaves_with_path(abstract)
    names = {_name(path): leaf for path, leaf in wanted}
    lines = [f"missing: {name}" for name in names if name not in found] + [f"unknown: {name}" for name in found if name not in names]
    for name, leaf in names.items():
        given = found.get(name)
        if given is not None and (given.shape, given.dtype) != (leaf.shape, leaf.dtype):
            lines.append(f"{name} is {given.dtype}{list(given.shape)}, but must be {leaf.dtype}{list(leaf.shape)}")
        elif given is not None and leaf.sharding is not None and not given.sharding.is_equivalent_to(leaf.sharding, len(leaf.shape)):
            lines.append(f"{name} is placed as {given.sharding}, but must be as {leaf.sharding}")
    if lines:
        more = f"; {len(lines) - MAX_SHOWN} more" if len(lines) > MAX_SHOWN else ""
        raise ConfigError(f"params do not fit the model: {'; '.join(lines[:MAX_SHOWN])}{more}")
    counts = jax.device_get({name: _num_not_finite(found[name]) for name in names})
    warn_of([f"{name} ({count} of {found[name].size})" for name, count in counts.items() if count])
    return jax.tree.unflatten(jax.tree.structure(abstract), [found[_name(path)] for path, _ in wanted])


@jax.jit
def _num_not_finite(parameter: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(parameter), dtype=jnp.int32)


def _name(path: tuple[Any, ...]) -> str:
    """`blocks.layers.0.norm.scale`, whatever kinds of nodes lead there; a variable's own value adds nothing."""
    words = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    return ".".join(word for word in words if word != "value")
