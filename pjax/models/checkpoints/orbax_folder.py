"""Folders with pjax's own parameters in orbax checkpoints: they go straight to the devices that hold them.

config.json, tokenizer.json, …       as in the Hugging Face folder
pjax_parameters.json                 every parameter: its group, shape, type, and the Hugging Face tensors that make it
params-00001-of-00002/               an orbax checkpoint of a tree {"blocks": {"0": {"attention": …}}}; more of them,
                                     so that a conversion needs the memory of one and can go on after the last one
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from pjax.errors import CheckpointError
from pjax.models.checkpoints.base import FolderCheckpoint, read_json
from pjax.models.checkpoints.stored import DTYPES
from pjax.models.weights import Source, flat_shardings, loading_bar, source_paths

MANIFEST = "pjax_parameters.json"
VERSION = 1


@dataclass(frozen=True)
class Parameter:
    """One parameter of a manifest."""

    group: str
    dtype: str
    source: Source  # the Hugging Face tensors in it

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        return self.source.shape

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class OrbaxFolder(FolderCheckpoint):
    """A folder that `pjax.convert` wrote. Raises CheckpointError when a file is missing or damaged."""

    format = "orbax"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parameters = _read_manifest(path)
        self._where = {name: (key, shape) for key, parameter in self._parameters.items() for name, shape in parameter.source.parts}
        self._last: tuple[str, np.ndarray] | None = None  # one parameter can make several tensors

    def names(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name and shape of every tensor."""
        return {name: shape for name, (_, shape) in self._where.items()}

    def dtypes(self) -> dict[str, str]:
        """Name and type of every tensor."""
        return {name: self._parameters[key].dtype for name, (key, _) in self._where.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor by its Hugging Face name: the rows of its parameter."""
        if name not in self._where:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        key, _ = self._where[name]
        if self._last is None or self._last[0] != key:
            self._last = None
            self._last = (key, self._restore({key: _AS_NUMPY})[key])
        part: np.ndarray = self._parameters[key].source.split(self._last[1])[name]
        return part

    def fits(self, sources: Mapping[str, Source]) -> bool:
        """Whether its parameters are those of the model as this version of pjax makes them."""
        return {key: parameter.source for key, parameter in self._parameters.items()} == dict(sources)

    def load(self, abstract: nnx.State[Any, Any], shardings: Any, *, progress: bool = True) -> nnx.State[Any, Any]:
        """The parameters, each read into its own sharding; only layers that are not stacked.

        As many at once as have the bytes of the largest one: the host holds about three times those beside what is on the
        devices (the bytes read, the decoded arrays, and what goes to the device).
        """
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = flat_shardings(abstract, shardings)
        leaves = {source_paths(path, 0)[0]: (path, leaf) for path, leaf in nnx.to_flat_state(abstract)}
        kinds = {key: (places[path] or default, leaf.dtype) for key, (path, leaf) in leaves.items()}
        loaded = {}
        with loading_bar(abstract, progress) as bar:
            for batch in self._batches():
                arrays = self._restore({key: kinds[key] for key in batch})
                for key, array in arrays.items():
                    path, leaf = leaves[key]
                    loaded[path] = leaf.replace(array)
                    bar.update(array.nbytes)
                jax.block_until_ready(list(arrays.values()))
        return nnx.from_flat_state([(path, loaded[path]) for path in places])

    def _batches(self) -> Iterable[list[str]]:
        """Parameters of one group, up to the largest one's bytes together."""
        most = max(parameter.num_bytes for parameter in self._parameters.values())
        batch: list[str] = []
        size, group = 0, ""
        for key, parameter in sorted(self._parameters.items(), key=lambda item: item[1].group):
            if batch and (parameter.group != group or size + parameter.num_bytes > most):
                yield batch
                batch, size = [], 0
            batch.append(key)
            size, group = size + parameter.num_bytes, parameter.group
        yield batch

    def _restore(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters of one group, as numpy arrays or with a (sharding, dtype) each."""
        import orbax.checkpoint as ocp

        group = self._parameters[next(iter(wanted))].group
        item, how = dict[str, Any](), dict[str, Any]()
        for key, kind in wanted.items():
            shape = self._parameters[key].shape
            if kind is _AS_NUMPY:
                item[key] = np.empty((0,), np.int8)
                how[key] = ocp.RestoreArgs(restore_type=np.ndarray)
            else:
                item[key] = jax.ShapeDtypeStruct(shape, kind[1])
                how[key] = ocp.ArrayRestoreArgs(sharding=kind[0], dtype=kind[1], global_shape=shape)
        arguments = ocp.args.PyTreeRestore(item=_nested(item), restore_args=_nested(how), partial_restore=True)
        try:
            with _checkpointer() as checkpointer:
                found = _flat(checkpointer.restore((self.path / group).absolute(), args=arguments))
        except Exception as error:  # orbax and tensorstore raise anything for a damaged file
            names = ", ".join(wanted)
            raise CheckpointError(f"{self.path / group} is damaged or truncated: {names:.200} can't be read: {error!s:.500}") from error
        for key in wanted:
            if tuple(found[key].shape) != self._parameters[key].shape:
                raise CheckpointError(
                    f"{self.path / group}: {key} is {list(found[key].shape)}, but {MANIFEST} says {list(self._parameters[key].shape)}"
                )
        return {key: found[key] for key in wanted}

    def close(self) -> None:
        """Forgets the parameters."""
        self._parameters, self._where, self._last = {}, {}, None


_AS_NUMPY = object()


def write_group(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """One group of parameters as an orbax checkpoint; it appears when it is whole."""
    import orbax.checkpoint as ocp

    with _checkpointer() as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(_nested(arrays)))


def write_manifest(folder: Path, parameters: Mapping[str, Parameter]) -> None:
    """pjax_parameters.json."""
    rows = {
        key: {
            "group": one.group,
            "dtype": one.dtype,
            "shape": one.shape,
            "parts": [{"name": name, "shape": shape} for name, shape in one.source.parts],
            "transposed": one.source.transposed,
        }
        for key, one in parameters.items()
    }
    (folder / MANIFEST).write_text(json.dumps({"version": VERSION, "parameters": rows}, indent=1), encoding="utf-8")


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    # Weights do not compress: without it they are read twice as fast.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False, restore_concurrent_gb=1))


def _read_manifest(folder: Path) -> dict[str, Parameter]:
    path = folder / MANIFEST
    manifest = read_json(path, is_unique=True)
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path}: version is {manifest.get('version')!r}, but must be {VERSION}; convert the checkpoint again")
    parameters = {}
    try:
        for key, row in manifest["parameters"].items():
            parts = tuple((str(part["name"]), tuple(int(n) for n in part["shape"])) for part in row["parts"])
            one = Parameter(str(row["group"]), str(row["dtype"]), Source(parts, bool(row["transposed"])))
            rest = {shape[1:] for _, shape in parts}
            if one.dtype not in DTYPES or len(rest) != 1 or (one.source.transposed and len(parts) > 1) or list(one.shape) != row["shape"]:
                raise ValueError(f"{key}: dtype {one.dtype}, shape {row['shape']} and parts do not fit together")
            parameters[key] = one
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r:.300}") from error
    if not parameters:
        raise CheckpointError(f"{path} has no parameters")
    for group in sorted({one.group for one in parameters.values()}):
        where = folder / group
        if Path(group).name != group or group in (".", "..") or where.resolve().parent != folder.resolve():
            raise CheckpointError(f"{path} points outside its folder: {group!r:.200}, but must name a folder in it")
        if not where.is_dir():
            raise CheckpointError(f"{folder} has no {group}, which {MANIFEST} names")
    return parameters


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *above, last = key.split(".")
        node = tree
        for word in above:
            node = node.setdefault(word, {})
        node[last] = value
    return tree


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for word, value in tree.items():
        flat |= _flat(value, f"{above}{word}.") if isinstance(value, Mapping) else {f"{above}{word}": value}
    return flat
