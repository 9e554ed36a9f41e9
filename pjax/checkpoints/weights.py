"""From a checkpoint's tensors to a model's parameters, one tensor at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from pjax.checkpoints.arena import Arena
from pjax.checkpoints.copying import copy_and_check, numpy_dtype
from pjax.errors import CheckpointError, UnsupportedError

Shape = tuple[int, ...]
MAX_NAMED = 20  # tensors in one warning
UNSTACKED = "of_layer"  # the list of `pjax.layers.kernels.LayerKernels`
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How several tensors make one parameter: a weight and its scales, say, or numbers that are packed in another way.

    Attributes:
      shape: of the parameter.
      make: the parameter, an array of `shape`, of the tensors in the order of a source's parts, as the checkpoint has them.
      split: the inverse, which `to_hf_state` needs: the tensors of the parameter; None where there is none.
    """

    shape: Shape
    make: Callable[..., np.ndarray]
    split: Callable[[Any], Sequence[Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class Weight:
    """The checkpoint tensors of one parameter, or of a `Linear` (kernel and, where it has one, bias)."""

    parts: tuple[tuple[str, Shape], ...]  # name without ".weight" for a Linear; shape as in the checkpoint
    is_linear: bool = False
    bias: bool = False
    transposed: bool = False  # the checkpoint's kernel is [in, out]
    recipe: Recipe | None = None

    @classmethod
    def plain(cls, name: str, shape: Shape) -> Weight:
        """One tensor, as it is."""
        return cls(parts=((name, shape),))

    @classmethod
    def linear(cls, num_in: int, *outs: tuple[str, int], bias: bool = False) -> Weight:
        """A `Linear` made of one or several torch linears `(name, num_out)`, side by side."""
        return cls(parts=tuple((name, (num_out, num_in)) for name, num_out in outs), is_linear=True, bias=bias)

    @classmethod
    def conv1d(cls, num_in: int, name: str, num_out: int) -> Weight:
        """A `Linear` whose checkpoint has its kernel as [in, out], GPT-2's "Conv1D", with a bias."""
        return cls(parts=((name, (num_in, num_out)),), is_linear=True, bias=True, transposed=True)

    @classmethod
    def made(cls, recipe: Recipe, *tensors: tuple[str, Shape]) -> Weight:
        """One parameter that a recipe makes of several tensors `(name, shape)`, of any types."""
        return cls(parts=tensors, recipe=recipe)


@dataclass(frozen=True)
class Piece:
    """A part of one dimension of a parameter, and where it stands in a device's share."""

    start: int
    count: int
    to: int


@dataclass(frozen=True)
class Source:
    """Tensors that, joined on the first axis, make one parameter; or one tensor, transposed; or what a recipe makes of them."""

    parts: tuple[tuple[str, Shape], ...]
    transposed: bool = False
    recipe: Recipe | None = None

    @property
    def shape(self) -> Shape:
        """Shape of the parameter."""
        if self.recipe is not None:
            return self.recipe.shape
        first = self.parts[0][1]
        return first[::-1] if self.transposed else (sum(shape[0] for _, shape in self.parts), *first[1:])

    def split(self, parameter: Any) -> dict[str, Any]:
        """The parts of a parameter by their names, as the checkpoint has them: the inverse of `fill`, for numpy or jax arrays.

        Raises UnsupportedError when a recipe made it that has no inverse.
        """
        if self.recipe is not None:
            names = [name for name, _ in self.parts]
            if self.recipe.split is None:
                raise UnsupportedError(f"tensors {', '.join(names)} can't be made of their parameter: the recipe has no inverse")
            return dict(zip(names, self.recipe.split(parameter), strict=True))
        if self.transposed:
            return {self.parts[0][0]: parameter.T}
        ends = np.cumsum([shape[0] for _, shape in self.parts])
        return {name: parameter[end - shape[0] : end] for (name, shape), end in zip(self.parts, ends, strict=True)}

    def _arrays(self, read: Callable[[str], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """The arrays that stand below each other in the parameter, each with the name of what it was made of."""
        if self.recipe is None:
            for name, _ in self.parts:
                yield name, read(name).T if self.transposed else read(name)
            return
        names = [name for name, _ in self.parts]
        made = self.recipe.make(*map(read, names))
        if tuple(made.shape) != self.recipe.shape:
            raise CheckpointError(f"{' and '.join(names)} make {list(made.shape)}, but the parameter is {list(self.recipe.shape)}")
        yield " and ".join(names), made

    def fill(self, target: np.ndarray, read: Callable[[str], np.ndarray], bad: list[str]) -> None:
        """Reads each part into its rows of `target`; names those with NaN or infinite values, as they are after the cast, in `bad`.

        What `read` gives is taken by slices of rows, in several threads.
        """
        start = 0
        for name, array in self._arrays(read):
            rows = target[start : start + len(array)]
            if (count := copy_and_check(rows, array)) > 0:
                bad.append(f"{name} ({count} of {array.size})")
            start += len(array)

    def fill_share(
        self, target: np.ndarray, read: Callable[[str], np.ndarray], bad: list[str], dimension: int, pieces: Sequence[Piece]
    ) -> None:
        """Like `fill`, for the `pieces` of a dimension (0 or 1) that a device has; what they do not reach is zero."""
        if sum(piece.count for piece in pieces) < target.shape[dimension]:
            target[...] = 0
        first = 0  # of the part, in the parameter
        for name, array in self._arrays(read):
            count, size = 0, 0
            for piece in pieces:
                low, high = piece.start, piece.start + piece.count
                if dimension == 0:  # what of the piece this part has
                    low, high = max(low, first), min(high, first + len(array))
                if low >= high:
                    continue
                to = slice(piece.to + low - piece.start, piece.to + high - piece.start)
                mine = array[low - first : high - first] if dimension == 0 else array[:, low:high]
                place = target[to] if dimension == 0 else target[first : first + len(array), to]
                count, size = count + copy_and_check(place, mine), size + mine.size
            if count:
                bad.append(f"{name} ({count} of {size} in one device's share)")
            first += len(array)


def expand(table: Mapping[str, Weight], num_layers: int) -> dict[str, Source]:
    """Every parameter's path and sources, one entry a layer."""
    sources: dict[str, Source] = {}
    for path, weight in table.items():
        for layer in range(num_layers) if "{}" in path else (0,):
            where = path.format(layer)
            parts = tuple((name.format(layer), shape) for name, shape in weight.parts)
            if not weight.is_linear:
                sources[where] = Source(parts, recipe=weight.recipe)
                continue
            sources[f"{where}.kernel"] = Source(tuple((f"{n}.weight", s) for n, s in parts), transposed=weight.transposed)
            if weight.bias:
                sources[f"{where}.bias"] = Source(tuple((f"{n}.bias", s[1:] if weight.transposed else s[:1]) for n, s in parts))
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
    shardings: Any = None,
    arena: Arena | None = None,
) -> nnx.State[Any, Any]:
    """The state with every abstract leaf replaced by its tensor, on the default device or as `shardings` says.

    At any time the host holds one parameter and one tensor beside what is on the device already. Tensors with NaN or
    infinite values are loaded, and named in a warning.

    Args:
      abstract: from `nnx.eval_shape`; its dtypes are the ones that the parameters get.
      sources: from `expand`.
      read: a tensor by its Hugging Face name.
      stacked_layers: how many layers are stacked on axis 0 of the parameters under `blocks.`; 0: none are.
      shardings: a tree like `abstract` with a jax.sharding.Sharding at every leaf.
      arena: where the parameters are to lie.
    """
    flat = list(nnx.to_flat_state(abstract))
    places = flat_shardings(abstract, shardings)
    loaded, bad, arena = [], list[str](), arena or Arena()
    with loading_bar(abstract, progress) as bar:
        for path, leaf in flat:
            target = arena.empty(leaf.shape, numpy_dtype(leaf.dtype))
            names = source_paths(path, stacked_layers)
            for index, name in enumerate(names):
                find_source(sources, name).fill(target[index] if is_stacked(path, stacked_layers) else target, read, bad)
            loaded.append((path, leaf.replace(jax.device_put(target, places[path], may_alias=True))))
            bar.update(target.nbytes)
    warn_of(bad)
    return nnx.from_flat_state(loaded)


def to_sources(state: nnx.State[Any, Any], sources: Mapping[str, Source], num_layers: int) -> dict[str, Any]:
    """Every checkpoint tensor, cut out of the parameters of a state: the inverse of `load_into`."""
    flat = {tuple(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}
    stacked_layers = 0 if any(path[:2] == ("blocks", "layers") and path[2].isdigit() for path in flat) else num_layers
    tensors: dict[str, Any] = {}
    for path, value in flat.items():
        for index, name in enumerate(source_paths(path, stacked_layers)):
            tensors |= find_source(sources, name).split(value[index] if is_stacked(path, stacked_layers) else value)
    return tensors


def loading_bar(abstract: Any, progress: bool) -> tqdm[Any]:
    """A progress bar over the bytes of parameters."""
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False, "disable": None if progress else True}
    return tqdm(total=total, desc="Loading weights", **options)


def flat_shardings(abstract: nnx.State[Any, Any], shardings: Any) -> dict[tuple[Any, ...], Any]:
    """Each parameter's sharding by its path in the flat state; None is the default device."""
    paths = [path for path, _ in nnx.to_flat_state(abstract)]
    if shardings is None:
        return dict.fromkeys(paths)
    given, needed = jax.tree.structure(shardings), jax.tree.structure(abstract)
    if bool(given != needed):  # type: ignore[operator]
        raise ValueError("shardings is not a tree like the abstract parameters, with a Sharding at every leaf")
    return dict(zip(paths, jax.tree.leaves(shardings), strict=True))


def warn_of(bad: Sequence[str]) -> None:
    """A warning that names tensors with NaN or infinite values."""
    if bad:
        more = f" and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
        log.warning("%d tensors have NaN or infinite values: %s%s", len(bad), ", ".join(bad[:MAX_NAMED]), more)


def source_paths(path: Sequence[Any], stacked_layers: int) -> list[str]:
    """The table's paths of a parameter: `blocks.layers.3.norm` is `blocks.3.norm`; stacked, it is one a layer.

    A kernel that scanned layers hold unstacked is that of its layer: `blocks.layers.out.kernel.of_layer.3` is `blocks.3.out.kernel`.
    """
    words = [str(word) for word in path]
    if words[0] != "blocks":
        return [".".join(words)]
    if UNSTACKED in words:
        at = words.index(UNSTACKED)
        return [".".join(["blocks", words[at + 1], *words[2:at], *words[at + 2 :]])]
    if stacked_layers:
        return [".".join(["blocks", str(layer), *words[2:]]) for layer in range(stacked_layers)]
    return [".".join(["blocks", *words[2:]])]


def is_stacked(path: Sequence[Any], stacked_layers: int) -> bool:
    """Whether a parameter holds those of all layers, on axis 0."""
    return bool(stacked_layers) and path[0] == "blocks" and UNSTACKED not in path


def find_source(sources: Mapping[str, Source], path: str) -> Source:
    """The tensors of a parameter by the table's path.

    A part of a product that is several kernels side by side has those of the product's parts: `qkv.kernel.parts.1` the second one.
    """
    if path in sources:
        return sources[path]
    whole, _, number = path.rpartition(".parts.")
    if whole not in sources or sources[whole].recipe or not number.isdigit() or int(number) >= len(sources[whole].parts):
        raise CheckpointError(f"the family's weight table has no tensors for parameter {path}")
    return Source((sources[whole].parts[int(number)],))
