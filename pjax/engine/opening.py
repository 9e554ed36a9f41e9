"""The model that an engine was given, as a source of its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pjax.config import EngineConfig
from pjax.errors import ConfigError
from pjax.models import ModelSource, open_model
from pjax.models.given import source_of


def open_source(model: Any, config: EngineConfig, platform: str, mesh: Any) -> tuple[ModelSource, str]:
    """The model and how its layers run."""
    if isinstance(model, str | Path):
        layer_mode = ("loop" if platform == "cpu" else "unroll") if config.layer_mode == "auto" else config.layer_mode
        return open_model(model, dtype=_resolve_dtype(config.dtype, platform), layer_mode=layer_mode, mesh=mesh), layer_mode
    if mesh is not None:
        raise ConfigError("tensor parallelism with a model that is a module: give the checkpoint's path, and params= in the mesh")
    source, own_mode = source_of(model), str(model.blocks.mode)
    for name, asked, own in (("dtype", config.dtype, source.dtype), ("layer_mode", config.layer_mode, own_mode)):
        if asked not in ("auto", own):
            raise ConfigError(f"{name} is {asked!r}, but the model that was given has {own!r}")
    return source, own_mode


def _resolve_dtype(dtype: str, platform: str) -> str:
    return ("float32" if platform == "cpu" else "auto") if dtype == "auto" else dtype
