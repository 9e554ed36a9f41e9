"""What was compiled is kept between processes: whole steps by `Executables`, or by JAX's persistent cache what they are compiled from."""

from __future__ import annotations

import logging
from pathlib import Path

import jax

from pjax.machine import user_folder

log = logging.getLogger(__name__)

MIN_SECONDS = 0.2  # a step that compiles faster is not worth a file


def use_compilation_cache(folder: str | None, *, whole_steps: bool) -> Path | None:
    """The folder for whole steps; or None, and JAX's persistent compilation cache is turned on for the whole process.

    Not both: what JAX's cache has given can't be saved again (its functions are not in it any more).

    Args:
      folder: "auto" keeps a cache that the user has set up (JAX_COMPILATION_CACHE_DIR) and else takes ~/.cache/pjax;
        None leaves JAX as it is, and keeps nothing. So does a folder that cannot be made, with a warning.
      whole_steps: whether `Executables` can keep this engine's steps.
    """
    own_cache = getattr(jax.config, "jax_compilation_cache_dir", None)
    if folder is None or (folder == "auto" and own_cache):
        return None
    path = _make(folder)
    if path is None:
        return None
    if whole_steps and not own_cache:
        return path / "steps"
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    return None


def _make(folder: str) -> Path | None:
    """The folder, made where it was not there; None, with a warning, where that is not possible."""
    base = user_folder("XDG_CACHE_HOME", ".cache") if folder == "auto" else None
    if folder == "auto" and base is None:
        log.warning("compiled programs are not kept: there is no home folder; name a folder by compilation_cache_dir or XDG_CACHE_HOME")
        return None
    path = Path(folder) if base is None else base / "pjax" / "xla"
    try:
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("compiled programs are not kept: %s", error)
        return None
    return path
