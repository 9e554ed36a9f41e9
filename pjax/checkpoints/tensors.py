"""A checkpoint's tensors by their Hugging Face names, whatever its format, checked against its config before any is read."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pjax.checkpoints import open_checkpoint
from pjax.checkpoints.base import Checkpoint
from pjax.checkpoints.stored import DTYPES, READABLE
from pjax.checkpoints.weights import Source, check_names, expand
from pjax.errors import CheckpointError, UnsupportedError

log = logging.getLogger(__name__)

PARAMETER_DTYPES = ("float32", "bfloat16", "float16")
COMPARED_ROWS = 1024  # of a head and its embedding, at once


@dataclass(frozen=True, kw_only=True)
class ModelTensors:
    """An open checkpoint that holds what its config needs.

    Attributes:
      hf: config.json's content, with tie_word_embeddings as the tensors have it.
      family: the module of the architecture.
      sources: every parameter's path, and the tensors that make it.
    """

    checkpoint: Checkpoint
    hf: Mapping[str, Any]
    family: Any
    config: Any
    sources: Mapping[str, Source]
    stored_names: Mapping[str, str]  # of the tensors in the checkpoint

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that parameters need, as checkpoints have them."""
        return {name: shape for source in self.sources.values() for name, shape in source.parts}

    @cached_property
    def _transposed(self) -> set[str]:
        return _transposed(self.sources)

    def read(self, name: str) -> np.ndarray:
        """A tensor by its Hugging Face name, in Hugging Face's order."""
        return np.asarray(self.rows(name))

    def rows(self, name: str) -> Any:
        """As `read`; what it gives may be made only where rows are taken."""
        array = self.checkpoint.rows(self.stored_names[name])
        if self.checkpoint.format != "gguf":
            return array
        if name in self._transposed:
            array = array.T
        arrange = getattr(self.family, "from_gguf", None)
        return array if arrange is None else arrange(name, array, self.config, self.hf["model_type"])

    def choose_dtype(self, wanted: str) -> str:
        """The type of the parameters: as wanted, or for "auto" what the config says, or else what most of the weights have.

        What the tensors have is logged, with what becomes of them.
        """
        found, sizes = self.checkpoint.dtypes(), Counter[str]()
        for name, shape in _plain(self.sources).items() or self.shapes.items():
            sizes[found[self.stored_names[name]]] += int(np.prod(shape, dtype=np.int64))
        chosen, why = wanted, "as asked"
        if wanted == "auto":
            stated = self.hf.get("dtype") or self.hf.get("torch_dtype")
            chosen = str(stated or sizes.most_common(1)[0][0]).removeprefix("torch.")
            why = "as its config says" if stated else "as most of them are"
            if not stated and chosen == "float64":
                chosen = "float32"
        if chosen not in PARAMETER_DTYPES:
            raise UnsupportedError(f"{self.checkpoint.path}: dtype is {chosen!r}; supported: {', '.join(PARAMETER_DTYPES)}")
        if set(sizes) != {chosen}:
            shares = ", ".join(f"{100 * size / sizes.total():.3g}% {dtype}" for dtype, size in sizes.most_common())
            log.info("%s: its weights are %s; parameters are %s, %s", self.checkpoint.path.name, shares, chosen, why)
        return chosen


def open_tensors(model: str | Path, find_family: Callable[[Mapping[str, Any]], Any]) -> ModelTensors:
    """Opens a checkpoint (folder, .gguf file or hub id).

    Raises CheckpointError when it is missing, damaged or does not fit its config, UnsupportedError when pjax does not have its
    architecture, or does not apply a field of its config or the type of a tensor.
    """
    checkpoint = open_checkpoint(model)
    try:
        return _open(checkpoint, find_family)
    except BaseException:
        checkpoint.close()
        raise


def _open(checkpoint: Checkpoint, find_family: Callable[[Mapping[str, Any]], Any]) -> ModelTensors:
    hf = dict(checkpoint.hf_config())
    family = find_family(hf)
    config = family.Config.from_hf(hf)
    found = checkpoint.names()
    if config.num_layers > len(found):
        raise CheckpointError(f"{checkpoint.path}: its config has {config.num_layers} layers, but there are {len(found)} tensors in all")
    is_gguf = checkpoint.format == "gguf"
    aliases = {} if is_gguf else _other_names(family, config, found)
    found = {name: found[stored] for name, stored in aliases.items()} | {n: s for n, s in found.items() if n not in aliases.values()}
    if not is_gguf and (pair := _tied_pair(family, config)):
        head, embedding = pair
        if head in found and embedding not in found:
            aliases[embedding] = aliases.get(head, head)
            found[embedding] = found.pop(head)
        elif head in found and found[head] == found.get(embedding) and not _equal(checkpoint, *(aliases.get(name, name) for name in pair)):
            log.warning(
                "%s: its config ties %s to %s, but the two differ: the head is used as it is", checkpoint.path.name, head, embedding
            )
            hf["tie_word_embeddings"] = False
            config = family.Config.from_hf(hf)
    sources = expand(family.weight_table(config), config.num_layers)
    wanted = [name for source in sources.values() for name, _ in source.parts]
    stored_names = {name: gguf_name(family, name) if is_gguf else aliases.get(name, name) for name in wanted}
    to_hf = {stored: name for name, stored in stored_names.items()} if is_gguf else {}
    renamed = {to_hf.get(name, name): shape for name, shape in found.items()}
    if is_gguf:
        renamed |= {name: renamed[name][::-1] for name in _transposed(sources) if name in renamed}
    check_names(sources, renamed, family.known_leftovers(config), str(checkpoint.path))
    dtypes = checkpoint.dtypes()
    plain = _plain(sources)
    allowed = {name: DTYPES if name in plain else READABLE for name in stored_names}  # a recipe may have whole numbers
    others = [f"{name} ({dtypes[stored]})" for name, stored in stored_names.items() if dtypes[stored] not in allowed[name]]
    if others:
        raise UnsupportedError(f"{checkpoint.path}: the types of tensors {', '.join(others)} are not among {', '.join(DTYPES)}")
    return ModelTensors(checkpoint=checkpoint, hf=hf, family=family, config=config, sources=sources, stored_names=stored_names)


def _plain(sources: Mapping[str, Source]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of tensors that are weights by themselves, and no part of a recipe."""
    return {name: shape for source in sources.values() if source.recipe is None for name, shape in source.parts}


def gguf_name(family: Any, name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    for ours, theirs in family.GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _transposed(sources: Mapping[str, Source]) -> set[str]:
    """Tensors that Hugging Face has as [in, out]; GGUF has every kernel as [out, in]."""
    return {name for source in sources.values() if source.transposed for name, _ in source.parts}


def _other_names(family: Any, config: Any, found: Mapping[str, Any]) -> dict[str, str]:
    """Stored names by transformers' own, where they differ: files without the family's prefix, and names of earlier versions."""
    names: dict[str, str] = {}
    has_prefix = any(name.startswith(family.PREFIX) for name in found)
    wanted = {name for source in expand(family.weight_table(config), config.num_layers).values() for name, _ in source.parts}
    leftovers = re.compile("|".join(f"(?:{pattern})" for pattern in family.known_leftovers(config)) or r"(?!)")
    for stored in found:
        name = family.OTHER_NAMES.get(stored, stored)
        full = family.PREFIX + name
        if not has_prefix and (full in wanted or leftovers.fullmatch(full)):
            name = full
        if name != stored:
            names[name] = stored
    return names


def _tied_pair(family: Any, config: Any) -> tuple[str, str] | None:
    """The tensors of the head and the embedding, where the config ties them."""
    if not getattr(config, "tied", False):
        return None
    sources = expand(family.weight_table(dataclasses.replace(config, tied=False)), 1)
    head, embedding = sources.get("head.kernel"), sources.get("embed.table")
    return (head.parts[0][0], embedding.parts[0][0]) if head and embedding else None


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors have the same type and bits; where a file stores them once, nothing is read."""
    a, b = checkpoint.read(one), checkpoint.read(other)
    if a.dtype != b.dtype:
        return False
    if a.__array_interface__["data"] == b.__array_interface__["data"] and a.strides == b.strides:
        return True
    bits = f"u{a.dtype.itemsize}"
    return all(
        np.array_equal(a[row : row + COMPARED_ROWS].view(bits), b[row : row + COMPARED_ROWS].view(bits))
        for row in range(0, len(a), COMPARED_ROWS)
    )
