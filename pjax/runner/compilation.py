"""What was compiled is kept between processes: whole steps by `Executables`, or by JAX's persistent cache what they are compiled from."""

from __future__ import annotations

import os
from pathlib import Path

import jax

MIN_SECONDS = 0.2  # a step that compiles faster is not worth a file


def use_compilation_cache(folder: str | None, *, whole_steps: bool) -> Path | None:
    """The folder for whole steps; or None, and JAX's persistent compilation cache is turned on for the whole process.

    Not both: what JAX's cache has given can't be saved again (its functions are not in it any more).

    Args:
      folder: "auto" keeps a cache that the user has set up (JAX_COMPILATION_CACHE_DIR) and else takes ~/.cache/pjax;
        None leaves JAX as it is, and keeps nothing.
      whole_steps: whether `Executables` can keep this engine's steps.
    """
    own_cache = getattr(jax.config, "jax_compilation_cache_dir", None)
    if folder is None or (folder == "auto" and own_cache):
        return None
    if folder == "auto":
        folder = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pjax" / "xla")
    if whole_steps and not own_cache:
        return Path(folder) / "steps"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    return None
