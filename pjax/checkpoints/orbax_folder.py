"""Folders with pjax's own parameters in orbax checkpoints: they go straight to the devices that hold them.

config.json, tokenizer.json, …       as in the Hugging Face folder
pjax_parameters.json                 every parameter: its group, shape, type, and the Hugging Face tensors that make it
params-00001-of-00002/               an orbax checkpoint of a tree {"blocks": {"0": {"attention": …}}}; more of them,
                                     so that a conversion needs the memory of one and can go on after the last one
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from pjax.checkpoints.base import FolderCheckpoint, read_json
from pjax.checkpoints.orbax_array import StoredArray, make_context
from pjax.checkpoints.stored import DTYPES
from pjax.checkpoints.weights import Source, flat_shardings, loading_bar, source_paths, warn_of
from pjax.errors import CheckpointError

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


class OrbaxFolder(FolderCheckpoint):
    """A folder that `pjax.convert` wrote. Raises CheckpointError when a file is missing or damaged."""

    format = "orbax"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parameters = _read_manifest(path)
        self._where = {name: (key, shape) for key, parameter in self._parameters.items() for name, shape in parameter.source.parts}
        self._context = make_context()

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
        parameter = self._parameters[key]
        last = parameter.shape[0]
        if parameter.source.transposed:
            return self._rows(key, slice(0, last)).T
        start = 0
        for part, shape in parameter.source.parts:
            if part == name:
                return self._rows(key, slice(start, start + shape[0]))
            start += shape[0]
        raise AssertionError(name)

    def _rows(self, key: str, rows: slice) -> np.ndarray:
        parameter = self._parameters[key]
        return self._array(key).read((rows, *(slice(None) for _ in parameter.shape[1:])), DTYPES[parameter.dtype])

    def fits(self, sources: Mapping[str, Source]) -> bool:
        """Whether its parameters are those of the model as this version of pjax makes them."""
        return {key: parameter.source for key, parameter in self._parameters.items()} == dict(sources)

    def load(self, abstract: nnx.State[Any, Any], shardings: Any, *, progress: bool = True) -> nnx.State[Any, Any]:
        """The parameters, each read into its own sharding; only layers that are not stacked.

        A process reads the parts that its devices hold, and no others. Beside what is on the devices the host holds one parameter.
        Parameters with NaN or infinite values are loaded, and named in a warning.
        """
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = flat_shardings(abstract, shardings)
        loaded, bad = [], list[str]()
        with loading_bar(abstract, progress) as bar:
            for path, leaf in nnx.to_flat_state(abstract):
                [key] = source_paths(path, 0)
                array, num_bad = self._array(key).place(places[path] or default, leaf.dtype)
                bad += [f"{key} ({num_bad} of {array.size})"] if num_bad else []
                loaded.append((path, leaf.replace(jax.block_until_ready(array))))
                bar.update(array.nbytes)
        warn_of(bad)
        return nnx.from_flat_state(loaded)

    def _array(self, key: str) -> StoredArray:
        parameter = self._parameters[key]
        return StoredArray(self.path / parameter.group, key, parameter.shape, self._context)

    def close(self) -> None:
        """Forgets the parameters."""
        self._parameters, self._where = {}, {}


def write_group(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """One group of parameters as an orbax checkpoint; it appears when it is whole."""
    import orbax.checkpoint as ocp

    # Weights do not compress: without it they are read as they lie in the file.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
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
        for file in where.rglob("*"):
            if not file.resolve().is_relative_to(folder.resolve()):
                raise CheckpointError(f"{file} leads to {file.resolve()}, outside its folder; put the file itself there")
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
