"""Tensor parallelism: how a model's parameters are divided among the devices of a mesh (Shoeybi et al. 2019, section 3).

A device's share of a model is a smaller model: fewer heads, a narrower feed-forward layer, a part of the vocabulary. It runs
under `jax.shard_map` on its own share of each parameter and of the page pool; `Linear` and `Embedding` add up what the devices
hold parts of. A parameter in the mesh is the devices' shares, one after the other (docs/parallel.md).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pjax.checkpoints.arena import aligned_empty
from pjax.checkpoints.copying import numpy_dtype
from pjax.checkpoints.weights import Piece, Source, find_source, is_stacked, loading_bar, source_paths, warn_of
from pjax.errors import ConfigError, UnsupportedError
from pjax.layers.kernels import Axis
from pjax.layers.linear import Embedding, Linear

MODEL_AXIS = "model"
MESH_AXES: dict[str, str | None] = {
    "vocab": MODEL_AXIS,  # padded to a multiple
    "heads": MODEL_AXIS,
    "kv_heads": MODEL_AXIS,  # where there are fewer than devices, as many devices as share one hold a copy of it
    "ffn": MODEL_AXIS,
    "embed": None,
}
"""Logical axis to the axis of the mesh that it is divided over; None is whole on every device."""


def make_mesh(size: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `size` devices (the first of all there are by default), all along the axis "model".

    Raises ConfigError when there are not as many.
    """
    devices = jax.devices() if devices is None else devices
    if size > len(devices):
        raise ConfigError(f"tensor_parallel_size is {size}, but there are {len(devices)} devices ({devices[0].platform})")
    return jax.make_mesh((size,), (MODEL_AXIS,), devices=devices[:size], axis_types=(AxisType.Auto,))


def choose_mesh(config: Any) -> Mesh | None:
    """The mesh of an engine's config (its tensor_parallel_size and mesh); None for one device.

    Raises ConfigError when there are too few devices, the mesh has no axis "model", the two do not agree, or it asks for several engines.
    """
    if config.data_parallel_size != 1:
        raise ConfigError(
            f"data_parallel_size is {config.data_parallel_size}, but an engine is one copy of the model; pjax.LLM runs several"
        )
    size, mesh = config.tensor_parallel_size, config.mesh
    if mesh is None:
        return make_mesh(size, devices_of_hosts(size, config.nnodes)) if config.nnodes > 1 else None if size == 1 else make_mesh(size)
    check_mesh(mesh)
    if len({device.process_index for device in mesh.devices.flat}) != config.nnodes:
        raise ConfigError(f"nnodes is {config.nnodes}, but the mesh that was given has devices of another number of hosts")
    if size not in (1, mesh.shape[MODEL_AXIS]):
        raise ConfigError(f"tensor_parallel_size is {size}, but the mesh that was given has {mesh.shape[MODEL_AXIS]} along {MODEL_AXIS!r}")
    return mesh


def devices_of_hosts(size: int, num_hosts: int) -> list[Any]:
    """`size` devices, as many of each host. ConfigError when that is no whole number, or a host has fewer."""
    if size % num_hosts:
        raise ConfigError(
            f"tensor_parallel_size is {size}, but must be a multiple of nnodes, {num_hosts}: it spans the devices of all hosts"
        )
    own, platform = len(jax.local_devices()), jax.devices()[0].platform
    if size // num_hosts > own:
        raise ConfigError(f"tensor_parallel_size is {size}, but {num_hosts} hosts have {own * num_hosts} devices, {own} each ({platform})")
    by_host: dict[int, list[Any]] = {}
    for device in jax.devices():
        by_host.setdefault(device.process_index, []).append(device)
    return [device for host in sorted(by_host) for device in by_host[host][: size // num_hosts]]


def check_mesh(mesh: Any) -> None:
    """Raises ConfigError unless it is a mesh with an axis "model"; over its other axes everything is the same."""
    if not isinstance(mesh, Mesh) or MODEL_AXIS not in mesh.axis_names:
        shown = f"has axes {', '.join(map(str, mesh.axis_names))}" if isinstance(mesh, Mesh) else f"is {type(mesh).__name__}"
        raise ConfigError(f"mesh {shown}, but must be a jax.sharding.Mesh with an axis {MODEL_AXIS!r}, which the model is divided over")


@dataclass(frozen=True)
class Section:
    """A part of a parameter's dimension that is divided by itself: queries, say, beside keys and values."""

    axis: str
    whole: int  # its size in the whole parameter
    own: int  # and in one share


@dataclass(frozen=True)
class Cut:
    """How a parameter is divided: one of its dimensions, section by section."""

    dimension: int  # of one layer's parameter
    sections: tuple[Section, ...]

    def pieces(self, share: int, num_shares: int) -> list[Piece]:
        """What share number `share` has of the whole parameter."""
        pieces, start, to = [], 0, 0
        for section in self.sections:
            first = share * section.own
            if section.own * num_shares > section.whole and section.axis == "kv_heads":
                first = share * section.whole // (num_shares * section.own) * section.own  # one head for several devices
            count = max(min(section.own, section.whole - first), 0)  # a padded vocabulary ends early
            pieces.append(Piece(start + first, count, to))
            start, to = start + section.whole, to + section.own
        return pieces


@dataclass(frozen=True, kw_only=True)
class Shares:
    """A model divided over a mesh.

    Attributes:
      config: of one device's share.
      graph: of one device's share, an NNX graph.
      abstract: the parameters in the mesh, a state of jax.ShapeDtypeStruct with shardings.
      cuts: by the path in the flat state; None for a parameter that is whole on every device.
    """

    mesh: Mesh
    config: Any
    graph: Any
    abstract: Any
    cuts: Mapping[tuple[Any, ...], Cut | None]

    @property
    def size(self) -> int:
        """How many shares there are."""
        return int(self.mesh.shape[MODEL_AXIS])

    @property
    def specs(self) -> Any:
        """A tree like `abstract` of PartitionSpecs, for `jax.shard_map`."""
        return jax.tree.map(lambda leaf: leaf.sharding.spec, self.abstract)

    def map(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(model, *args)` of one device's share, as a function `(params, *args)` of the mesh. Differentiable.

        Arguments and results are the same on every device. `pjax.models.forward` gives each its share of the logits.
        """
        whole = PartitionSpec()

        def run(params: Any, args: tuple[Any, ...]) -> Any:
            return function(nnx.merge(self.graph, params), *args)

        mapped = jax.shard_map(run, mesh=self.mesh, in_specs=(self.specs, whole), out_specs=whole, check_vma=False)
        return lambda params, *args: mapped(params, args)

    def load(self, sources: Mapping[str, Source], read: Callable[[str], np.ndarray], *, stacked_layers: int, progress: bool) -> Any:
        """The parameters, each device's share read by itself; see `weights.load_into` for arguments and what the host holds."""
        loaded, bad = [], list[str]()
        with loading_bar(self.abstract, progress) as bar:
            for path, leaf in nnx.to_flat_state(self.abstract):
                # Shares of one tensor that is no view of a file (it is dequantised, say) are cut from one reading.
                fill = functools.partial(self._fill, path, leaf, sources, functools.cache(read), stacked_layers, bad)
                array = jax.make_array_from_callback(leaf.shape, leaf.sharding, functools.partial(self._share, path, leaf, fill, {}))
                loaded.append((path, leaf.replace(array)))
                bar.update(array.nbytes)
        warn_of(bad)
        return nnx.from_flat_state(loaded)

    def _share(self, path: Any, leaf: Any, fill: Any, made: dict[int, np.ndarray], index: tuple[slice, ...]) -> np.ndarray:
        """The share at `index` of the array in the mesh; made once, for any number of devices."""
        cut = self.cuts[path]
        if cut is None:
            share = 0
        else:
            at = index[len(leaf.shape) - len(leaf.get_metadata()["axes"]) + cut.dimension]
            share = (at.start or 0) // sum(section.own for section in cut.sections)
        if share not in made:
            made[share] = fill(share)
        return made[share]

    def _fill(
        self, path: Any, leaf: Any, sources: Mapping[str, Source], read: Any, stacked_layers: int, bad: list[str], share: int
    ) -> np.ndarray:
        cut = self.cuts[path]
        target = aligned_empty(leaf.sharding.shard_shape(leaf.shape), numpy_dtype(leaf.dtype))
        names = source_paths(path, stacked_layers)
        for index, name in enumerate(names):
            rows = target[index] if is_stacked(path, stacked_layers) else target
            if cut is None:
                find_source(sources, name).fill(rows, read, bad)
            else:
                find_source(sources, name).fill_share(rows, read, bad, cut.dimension, cut.pieces(share, self.size))
        return target


def divide(make: Callable[[Any], nnx.Module], config: Any, mesh: Mesh) -> Shares:
    """A model's shares over the axis "model" of a mesh.

    Args:
      make: the model of a config.

    Raises:
      ConfigError: the mesh does not divide the model; with names and numbers.
      UnsupportedError: the family does not name the logical axes of its parameters.
    """
    check_mesh(mesh)
    size = int(mesh.shape[MODEL_AXIS])
    own_config = share_of_config(config, size)
    whole = nnx.state(nnx.eval_shape(lambda: make(config)))
    model = nnx.eval_shape(lambda: make(own_config))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear | Embedding):
            axis = module.kernel.axes[1] if isinstance(module, Linear) else module.table.axes[0]
            module.sum_over = MODEL_AXIS if _is_divided(axis) else None
    graph, state = nnx.split(model)
    cuts, placed = dict[tuple[Any, ...], Cut | None](), []
    for (path, leaf), (_, of_whole) in zip(nnx.to_flat_state(state), nnx.to_flat_state(whole), strict=True):
        cut = _cut(path, leaf, of_whole)
        cuts[path] = cut
        shape, spec = list(leaf.shape), list[str | None]([None] * len(leaf.shape))
        if cut is not None:
            dimension = len(shape) - len(leaf.get_metadata()["axes"]) + cut.dimension
            shape[dimension] *= size
            spec[dimension] = MODEL_AXIS
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        placed.append((path, leaf.replace(jax.ShapeDtypeStruct(tuple(shape), leaf.dtype, sharding=sharding))))
    return Shares(mesh=mesh, config=own_config, graph=graph, abstract=nnx.from_flat_state(placed), cuts=cuts)


def share_of_config(config: Any, size: int) -> Any:
    """The config of a device's share among `size`; ConfigError when they do not divide the model."""
    fields = {field.name for field in dataclasses.fields(config)}
    missing = [name for name in ("num_heads", "intermediate_size", "vocab_size") if name not in fields]
    if missing:
        raise UnsupportedError(f"tensor parallelism: {type(config).__name__} has no {', '.join(missing)}, which a model's share needs")
    heads, kv_heads, wide = config.num_heads, config.num_kv_heads, config.intermediate_size
    for name, number in (("num_heads", heads), ("intermediate_size", wide)):
        if number % size:
            raise ConfigError(f"tensor parallelism over {size} devices: {size} must divide {name}, which is {number}")
    if kv_heads % size and size % kv_heads:
        raise ConfigError(f"tensor parallelism over {size} devices: {size} must divide num_kv_heads, which is {kv_heads}, or be a multiple")
    changes = {"num_heads": heads // size, "intermediate_size": wide // size, "vocab_size": -(-config.vocab_size // size)}
    if "num_kv_heads" in fields:
        changes["num_kv_heads"] = max(kv_heads // size, 1)
    if getattr(config, "kv_cache_specs", None) is not None:
        raise UnsupportedError(f"tensor parallelism: {type(config).__name__} has kv_cache_specs, which are not divided")
    return dataclasses.replace(config, **changes)


def _is_divided(axis: Axis) -> bool:
    names = [axis] if isinstance(axis, str) else [name for name, _ in axis or ()]
    return any(MESH_AXES[name] for name in names)


def _cut(path: Any, own: Any, whole: Any) -> Cut | None:
    """From a parameter of the share and of the whole model. UnsupportedError when they differ where no logical axis says so."""
    axes, whole_axes = (leaf.get_metadata().get("axes", ()) for leaf in (own, whole))
    stacked = len(own.shape) - len(axes)
    cut = None
    for dimension, (own_size, whole_size) in enumerate(zip(own.shape, whole.shape, strict=True)):
        axis = axes[dimension - stacked] if axes and dimension >= stacked else None
        if _is_divided(axis):
            sections = ((axis, own_size),) if isinstance(axis, str) else axis or ()
            of_whole = ((axis, whole_size),) if isinstance(axis, str) else whole_axes[dimension - stacked]
            pairs = zip(sections, of_whole, strict=True)
            cut = Cut(dimension - stacked, tuple(Section(name, size, part) for (name, part), (_, size) in pairs))
        elif own_size != whole_size:
            name = ".".join(map(str, path))
            raise UnsupportedError(f"tensor parallelism: the family names no logical axis for dimension {dimension} of {name}")
    return cut
