"""Block sizes as data: what `scripts/tune_kernels.py` measured on a kind of device, or else a backend's defaults.

`tuned/<device kind>.json` holds a list of entries: the key of a shape, and the sizes that were fastest there by backend.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax

from pjax.pallas_kernels.paged_attention.options import AttentionOptions

FOLDER = Path(__file__).with_name("tuned")
Sizes = TypeVar("Sizes")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What block sizes depend on."""

    dtype: str
    page_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int

    @classmethod
    def of(cls, q: jax.Array, pages: jax.Array, options: AttentionOptions) -> Shape:
        """Of a call's arguments."""
        return cls(
            dtype=str(q.dtype),
            page_size=pages.shape[1],
            num_heads=q.shape[1],
            num_kv_heads=options.num_kv_heads,
            head_size=q.shape[2],
        )


def tuned(backend: str, default: Sizes, shape: Shape) -> Sizes:
    """`default` (a dataclass of integers) with the fields that were measured for this shape on this kind of device.

    Raises ValueError when an entry names a field that the backend does not have.
    """
    sizes = entries(jax.devices()[0].device_kind).get((backend, shape), {})
    known = {field.name for field in dataclasses.fields(default)}  # type: ignore[arg-type]
    if not known.issuperset(sizes):
        raise ValueError(
            f"{file_of(jax.devices()[0].device_kind)}: sizes of {backend!r} are {sorted(sizes)}, but must be of {sorted(known)}"
        )
    return dataclasses.replace(default, **sizes)  # type: ignore[type-var]


def file_of(device_kind: str) -> Path:
    """Where the sizes for a kind of device lie, whether there are any or not."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json")


@functools.cache
def entries(device_kind: str) -> Mapping[tuple[str, Shape], dict[str, int]]:
    """Sizes by backend and shape; empty for a kind of device that nobody measured. ValueError when the file is damaged."""
    path = file_of(device_kind)
    if not path.exists():
        return {}
    try:
        found: dict[tuple[str, Shape], dict[str, int]] = {}
        for entry in json.loads(path.read_text(encoding="utf-8"))["entries"]:
            found[entry["backend"], Shape(**entry["shape"])] = {name: int(value) for name, value in entry["sizes"].items()}
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a list of tuned sizes: {error!r}") from error


def write_entries(device_kind: str, measured: Mapping[tuple[str, Shape], Mapping[str, Any]], folder: Path) -> Path:
    """Writes (or extends) the file of a kind of device: by backend and shape, an entry's other fields (`sizes` among them)."""
    path = folder / file_of(device_kind).name
    old = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.exists() else []
    kept = [entry for entry in old if (entry["backend"], Shape(**entry["shape"])) not in measured]
    new = [{"backend": backend, "shape": dataclasses.asdict(shape)} | dict(entry) for (backend, shape), entry in measured.items()]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": device_kind, "entries": kept + new}, indent=1) + "\n", encoding="utf-8")
    return path
