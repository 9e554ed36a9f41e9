"""Block sizes as data: what `scripts/tune_kernels.py` measured on a kind of device, or else a backend's defaults.

`tuned/<device kind>.json` holds a list of entries: backend, phase and shape, and the sizes that were fastest there. A backend that
has sizes gives its module `default_sizes(q, pages, options, phase)`, a dataclass of integers, and `CANDIDATES`, the values to try for
some of its fields by phase; its `attend` takes sizes by phase, and `choose` fills in those that the caller leaves open.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax

from pjax.pallas_kernels.paged_attention.options import AttentionOptions

FOLDER = Path(__file__).with_name("tuned")
MODELS = {  # query heads, KV heads, head size: shapes worth knowing
    "SmolLM2-135M": (9, 3, 64),
    "Llama-3-8B": (32, 8, 128),
    "Llama-3-70B": (64, 8, 128),
    "Pythia-2.8B": (32, 32, 80),
    "GPT-NeoX-20B": (64, 64, 96),
    "OPT-6.7B": (32, 32, 128),
    "gpt2-xl": (25, 25, 64),
}
PHASES = ("decode", "prefill")
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
        """The shape of a call's arguments."""
        return cls(
            dtype=str(q.dtype),
            page_size=pages.shape[1],
            num_heads=q.shape[1],
            num_kv_heads=options.num_kv_heads,
            head_size=q.shape[2],
        )


def choose(
    backend: str,
    default: Callable[[jax.Array, jax.Array, AttentionOptions, str], Sizes],
    q: jax.Array,
    pages: jax.Array,
    options: AttentionOptions,
    given: Mapping[str, Sizes] | None,
) -> dict[str, Sizes]:
    """A call's sizes by phase: the given ones, or else the tuned ones, or else the default."""
    shape = Shape.of(q, pages, options)
    return {phase: (given or {}).get(phase) or tuned(backend, phase, default(q, pages, options, phase), shape) for phase in PHASES}


def tuned(backend: str, phase: str, default: Sizes, shape: Shape) -> Sizes:
    """`default` with the fields that were measured for this phase ("decode", "prefill") and shape on this kind of device.

    Raises ValueError when an entry names a field that the backend does not have.
    """
    kind = jax.devices()[0].device_kind
    sizes = entries(kind).get((backend, phase, shape), {})
    known = {field.name for field in dataclasses.fields(default)}  # type: ignore[arg-type]
    if not known.issuperset(sizes):
        raise ValueError(f"{file_of(kind)}: sizes of {backend!r} are {sorted(sizes)}, but must be of {sorted(known)}")
    return dataclasses.replace(default, **sizes)  # type: ignore[type-var]


Key = tuple[str, str, Shape]  # backend, phase, shape


def file_of(device_kind: str) -> Path:
    """Where the sizes for a kind of device lie, whether there are any or not."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json")


@functools.cache
def entries(device_kind: str) -> Mapping[Key, dict[str, int]]:
    """Sizes; empty for a kind of device that nobody measured. ValueError when the file is damaged."""
    path = file_of(device_kind)
    if not path.exists():
        return {}
    try:
        found: dict[Key, dict[str, int]] = {}
        for entry in json.loads(path.read_text(encoding="utf-8"))["entries"]:
            found[_key(entry)] = {name: int(value) for name, value in entry["sizes"].items()}
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a list of tuned sizes: {error!r}") from error


def _key(entry: Mapping[str, Any]) -> Key:
    return entry["backend"], entry["phase"], Shape(**entry["shape"])


def write_entries(device_kind: str, measured: Mapping[Key, Mapping[str, Any]], folder: Path = FOLDER) -> Path:
    """Writes or extends the file of a kind of device: each entry's `sizes`, and what else is to be kept with it."""
    path = folder / file_of(device_kind).name
    old = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.exists() else []
    kept = [entry for entry in old if _key(entry) not in measured]
    new = [
        {"backend": backend, "phase": phase, "shape": dataclasses.asdict(shape)} | dict(entry)
        for (backend, phase, shape), entry in measured.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": device_kind, "entries": kept + new}, indent=1) + "\n", encoding="utf-8")
    entries.cache_clear()
    return path
