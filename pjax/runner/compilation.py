"""Compiled steps are kept between processes by JAX's persistent cache."""

from __future__ import annotations

import os
from pathlib import Path

import jax

MIN_SECONDS = 0.2  # a step that compiles faster is not worth a file


def use_compilation_cache(folder: str | None) -> None:
    """Turns JAX's persistent compilation cache on, for the whole process.

    Args:
      folder: "auto" keeps a cache that the user has set up (JAX_COMPILATION_CACHE_DIR) and else takes ~/.cache/pjax;
        None leaves JAX as it is.
    """
    if folder is None or (folder == "auto" and getattr(jax.config, "jax_compilation_cache_dir", None)):
        return
    if folder == "auto":
        folder = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pjax" / "xla")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
