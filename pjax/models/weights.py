"""From a checkpoint's tensors to a model's parameters, one tensor at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from tqdm import tqdm

from pjax.errors import CheckpointError

Shape = tuple[int, ...]
ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class Weight:
    """The checkpoint tensors of one parameter, or of a `Linear` (kernel and, where it has one, bias)."""

    parts: tuple[tuple[str, Shape], ...]  # name without ".weight" for a Linear; shape as in the checkpoint
    is_linear: bool = False
    bias: bool = False

    @classmethod
    def plain(cls, name: str, shape: Shape) -> Weight:
        """One tensor, as it is."""
        return cls(parts=((name, shape),))

    @classmethod
    def linear(cls, num_in: int, *outs: tuple[str, int], bias: bool = False) -> Weight:
        """A `Linear` made of one or several torch linears `(name, num_out)`, side by side."""
        return cls(parts=tuple((name, (num_out, num_in)) for name, num_out in outs), is_linear=True, bias=bias)


@dataclass(frozen=True)
class Source:
    """Tensors that, joined on the first axis, make one parameter."""

    parts: tuple[tuple[str, Shape], ...]

    def fill(self, target: np.ndarray, read: Callable[[str], np.ndarray]) -> None:
        """Reads each part into its rows of `target`."""
        start = 0
        for name, _ in self.parts:
            array = read(name)
            target[start : start + len(array)] = array
            start += len(array)


def expand(table: Mapping[str, Weight], num_layers: int) -> dict[str, Source]:
    """Every parameter's path and sources, one entry a layer."""
    sources: dict[str, Source] = {}
    for path, weight in table.items():
        for layer in range(num_layers) if "{}" in path else (0,):
            where = path.format(layer)
            parts = tuple((name.format(layer), shape) for name, shape in weight.parts)
            if not weight.is_linear:
                sources[where] = Source(parts)
                continue
            sources[f"{where}.kernel"] = Source(tuple((f"{n}.weight", s) for n, s in parts))
            if weight.bias:
                sources[f"{where}.bias"] = Source(tuple((f"{n}.bias", s[:1]) for n, s in parts))
    return sources


def check_names(sources: Mapping[str, Source], found: Mapping[str, Shape], ignored: Iterable[str], place: str) -> None:
    """Raises CheckpointError that lists every missing, unused and wrongly shaped tensor by name."""
    wanted = {name: shape for source in sources.values() for name, shape in source.parts}
    known = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
    lines = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in found]
    lines += [f"unused: {name} {list(found[name])}" for name in found if name not in wanted and not known.fullmatch(name)]
    lines += [
        f"wrong shape: {name} is {list(found[name])}, but the config says {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != shape
    ]
    if lines:
        raise CheckpointError(f"{place}: {len(lines)} tensors do not fit its config:\n  " + "\n  ".join(lines))


def load_into(
    abstract: nnx.State[Any, Any],
    sources: Mapping[str, Source],
    read: Callable[[str], np.ndarray],
    *,
    stacked_layers: int = 0,
    progress: bool = True,
) -> nnx.State[Any, Any]:
    """The state with every abstract leaf replaced by its tensor, on the default device.

    At any time the host holds one parameter and one tensor beside what is on the device already.

    Args:
      abstract: from `nnx.eval_shape`; its dtypes are the ones that the parameters get.
      sources: from `expand`.
      read: a tensor by its Hugging Face name.
      stacked_layers: how many layers are stacked on axis 0 of the parameters under `blocks.`; 0: none are.
    """
    flat = nnx.to_flat_state(abstract)
    loaded = []
    for path, leaf in tqdm(flat, desc="Loading weights", unit="tensor", leave=False, disable=None if progress else True):
        target = _aligned_empty(leaf.shape, _numpy_dtype(leaf.dtype))
        names = source_paths(path, stacked_layers)
        for index, name in enumerate(names):
            sources[name].fill(target[index] if len(names) > 1 or (stacked_layers and "blocks" in path) else target, read)
        loaded.append((path, leaf.replace(jax.device_put(target, may_alias=True))))
    return nnx.from_flat_state(loaded)


def source_paths(path: Sequence[str | int], stacked_layers: int) -> list[str]:
    """The table's paths of a parameter: `blocks.layers.3.norm` is `blocks.3.norm`; stacked, it is one a layer."""
    words = [str(word) for word in path]
    if words[0] != "blocks":
        return [".".join(words)]
    if stacked_layers:
        return [".".join(["blocks", str(layer), *words[2:]]) for layer in range(stacked_layers)]
    return [".".join(["blocks", *words[2:]])]


def _aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """Uninitialised memory that a CPU device takes over without a copy: XLA asks for 64-byte alignment."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _numpy_dtype(dtype: Any) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if str(dtype) == "bfloat16" else np.dtype(dtype)
