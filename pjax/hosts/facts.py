"""What hosts compare before they start, by the names under which an error tells it."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pjax import __version__
from pjax.checkpoints.gguf_parts import parts_of
from pjax.config import EngineConfig

OWN = ("node_rank", "master_addr", "master_port", "master_key", "start_timeout", "compilation_cache_dir", "seed")
"""Settings that each host may have for itself."""
WEIGHTS = (".safetensors", ".bin", ".gguf")
SAMPLE = 1 << 20  # bytes read at the beginning, in the middle and at the end of a file: whole checkpoints take minutes


def of_code_and_flags(config: EngineConfig) -> dict[str, Any]:
    """Versions, a digest of pjax's own sources, and the engine's settings."""
    import jax

    facts: dict[str, Any] = {
        "pjax": __version__,
        "pjax's sources": digest_of_sources(Path(__file__).resolve().parents[1]),
        "jax": jax.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
    }
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name == "logits_processors":
            value = list(value)  # their order counts; of the functions only the names can be told
        elif item.name == "mesh":
            value = None if value is None else {str(name): size for name, size in value.shape.items()}
        if item.name not in OWN:
            facts[item.name] = value
    return facts


def of_devices() -> dict[str, Any]:
    """This host's own devices."""
    import jax

    devices = jax.local_devices()
    return {"platform": devices[0].platform, "device_kind": devices[0].device_kind, "number of devices": len(devices)}


def of_model(config: Any, dtype: str, path: Path) -> dict[str, Any]:
    """The model's config, and the size and a digest of every file that weights come from."""
    facts = {f"config.{name}": repr(value) for name, value in dataclasses.asdict(config).items()}
    return facts | {"the weights' type": dtype} | {f"file {name}": text for name, text in _files(path)}


def digest_of_sources(folder: Path) -> str:
    """The SHA-256 of every Python file in a folder."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        found.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def _files(path: Path) -> Iterable[tuple[str, str]]:
    if path.is_file():
        return [(part.name, describe_file(part)) for part in parts_of(path)]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    weights = [file for file in files if file.suffix in WEIGHTS]
    return [(str(file.relative_to(path)), describe_file(file)) for file in weights or files]  # orbax has its own names


def describe_file(path: Path) -> str:
    """Size and digest of a sample of it."""
    size, found = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for start in sorted({0, max((size - SAMPLE) // 2, 0), max(size - SAMPLE, 0)}):
            file.seek(start)
            found.update(file.read(SAMPLE))
    return f"of {size} bytes, {found.hexdigest()[:12]}"
