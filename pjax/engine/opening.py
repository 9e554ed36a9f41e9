"""The model that an engine was given, as a source of its parameters, and its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from pjax import native
from pjax.checkpoints.arena import Arena
from pjax.config import EngineConfig
from pjax.errors import ConfigError
from pjax.models import ModelSource, open_model
from pjax.models.given import source_of
from pjax.text.loading import load_tokenizer
from pjax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

TokenizerOf = Callable[[ModelSource], Tokenizer | None]


def open_source(model: Any, config: EngineConfig, platform: str, mesh: Any, arena: Arena | None = None) -> tuple[ModelSource, str]:
    """The model and how its layers run. Says where a CPU goes without native kernels."""
    try:
        level = native.cpu_level()
    except ValueError as error:  # PJAX_CPU_LEVEL
        raise ConfigError(str(error)) from error
    if platform == "cpu" and level is None:
        log.warning("steps run without native CPU kernels, and more slowly: the library %s", native.MISSING)
    if arena is not None and (mesh is not None or platform != "cpu"):
        arena.close()  # what is only on its way to a device has memory of its own
        arena = None
    if isinstance(model, str | Path):
        layer_mode = ("loop" if platform == "cpu" else "unroll") if config.layer_mode == "auto" else config.layer_mode
        dtype = _resolve_dtype(config.dtype, platform)
        return open_model(model, dtype=dtype, layer_mode=layer_mode, mesh=mesh, arena=arena), layer_mode
    if mesh is not None:
        raise ConfigError("tensor parallelism with a model that is a module: give the checkpoint's path, and params= in the mesh")
    source, own_mode = source_of(model), str(model.blocks.mode)
    for name, asked, own in (("dtype", config.dtype, source.dtype), ("layer_mode", config.layer_mode, own_mode)):
        if asked not in ("auto", own):
            raise ConfigError(f"{name} is {asked!r}, but the model that was given has {own!r}")
    return source, own_mode


def bytes_to_come(source: ModelSource, arena: Arena | None) -> int:
    """What the weights will still take of a device's free memory; of what the arena has for them, no more than they need is kept."""
    if arena is None:
        return source.num_bytes
    return max(source.num_bytes - arena.expect(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(source.abstract)), 0)


def open_tokenizer(source: ModelSource, *, tokenizer: str | Path | None, skip: bool, is_module: bool) -> Tokenizer | None:
    """The tokenizer that was named, or the checkpoint's; None where it is to be skipped. What fails ends the source's loading too."""
    if skip:
        return None
    try:
        if tokenizer is None and is_module:
            raise ConfigError("model is a module, which has no tokenizer: give tokenizer= a path, or set skip_tokenizer_init")
        return load_tokenizer(Path(tokenizer or source.path), header=source.header if tokenizer is None else None)
    except BaseException:
        source.close()
        raise


def _resolve_dtype(dtype: str, platform: str) -> str:
    return ("float32" if platform == "cpu" else "auto") if dtype == "auto" else dtype
