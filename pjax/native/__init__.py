"""The library of native CPU kernels, built when pjax is installed where a C++ compiler is."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
import os
import re
import threading
from pathlib import Path

import jax

log = logging.getLogger(__name__)

ATTENTION = "pjax_paged_attention"
KV_WRITE = "pjax_kv_write"
PRODUCT = "pjax_product"
RESERVE = "pjax_reserve"
MISSING = "was not built, or does not load: with a C++ compiler, pip install --no-build-isolation builds it for the jaxlib that is there"
CPU_LEVELS = ("baseline", "avx2", "avx512", "amx")
"""Levels of a processor's instruction sets, each with those before it; `baseline` is what all processors of its architecture have."""
SYMBOLS = {ATTENTION: "PjaxPagedAttention", KV_WRITE: "PjaxKvWrite", PRODUCT: "PjaxProduct", RESERVE: "PjaxReserve"}

_lock = threading.Lock()


def library() -> ctypes.CDLL | None:
    """The library, with its kernels registered for XLA's calls by the names above; None where it was not built or XLA does not take it.

    Any thread may be the first to ask: the kernels are registered once. PJAX_CPU_LEVEL is read then.
    Raises ValueError when PJAX_CPU_LEVEL names no level, or one that this machine does not have.
    """
    with _lock:
        return _load()


def cpu_level() -> str | None:
    """The level of instruction sets that the kernels use, one of `CPU_LEVELS`; None without the library."""
    loaded = library()
    return None if loaded is None else CPU_LEVELS[loaded.PjaxCpuLevel()]


def limit_cpu_level(level: str | None) -> None:
    """Hides the instruction sets above a level from the kernels, for the whole process; None hides nothing.

    What was traced before may keep a choice that was made for another level: compile it anew.
    XLA's own code is not concerned: XLA_FLAGS=--xla_cpu_max_isa=AVX2 and the like are for that.

    Raises ValueError when `level` is not one of `CPU_LEVELS`, or one that this machine does not have.
    """
    _check_level(level, "level")
    with _lock:
        if (loaded := _load()) is not None:
            _limit(loaded, level, "level")


def _check_level(level: str | None, name: str) -> None:
    if level is not None and level not in CPU_LEVELS:
        raise ValueError(f"{name} is {level!r}, but must be one of {', '.join(CPU_LEVELS)}")


def _limit(loaded: ctypes.CDLL, level: str | None, name: str) -> None:
    loaded.PjaxLimitCpuLevel(len(CPU_LEVELS) - 1)
    if level is None:
        return
    machine = loaded.PjaxCpuLevel()
    if CPU_LEVELS.index(level) > machine:
        raise ValueError(f"{name} is {level!r}, but this machine has {CPU_LEVELS[machine]!r} at most")
    loaded.PjaxLimitCpuLevel(CPU_LEVELS.index(level))


def ffi_version() -> int:
    """1000 · major + minor version of XLA's calls in the jaxlib that is here, by its headers; it takes libraries of no later one."""
    text = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text(encoding="utf-8")
    found = dict(re.findall(r"^#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text, re.MULTILINE))
    return 1000 * int(found["MAJOR"]) + int(found["MINOR"])


@functools.cache
def _load() -> ctypes.CDLL | None:
    level = os.environ.get("PJAX_CPU_LEVEL") or None
    _check_level(level, "PJAX_CPU_LEVEL")
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_library{suffix}")
        if not path.exists():
            continue
        try:
            loaded = ctypes.cdll.LoadLibrary(str(path))
            built, here = loaded.PjaxFfiVersion(), ffi_version()
            if built > here:  # XLA may look at it only when its backend starts, and that would fail
                raise RuntimeError(f"built for version {built} of XLA's calls, but that of jax {jax.__version__} is {here}")
            for advise in (loaded.PjaxUseLargePages, loaded.PjaxTouch):
                advise.argtypes, advise.restype = [ctypes.c_void_p, ctypes.c_uint64], None
            loaded.PjaxCopyWeights.argtypes = [ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64]
            loaded.PjaxCopyWeights.restype = ctypes.c_int64
            for target, symbol in SYMBOLS.items():
                jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(loaded, symbol)), platform="cpu")
        except Exception as error:  # built for another jaxlib, or from other sources: the XLA forms serve as well
            log.warning("the native CPU kernels in %s do not load, XLA is used instead: %s", path, error)
            return None
        _limit(loaded, level, "PJAX_CPU_LEVEL")
        return loaded
    return None
