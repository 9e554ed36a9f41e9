"""The library of native CPU kernels, built when pjax is installed where a C++ compiler is."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
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
SYMBOLS = {ATTENTION: "PjaxPagedAttention", KV_WRITE: "PjaxKvWrite", PRODUCT: "PjaxProduct", RESERVE: "PjaxReserve"}


_lock = threading.Lock()


def library() -> ctypes.CDLL | None:
    """The library, with its kernels registered for XLA's calls by the names above; None where it was not built or XLA does not take it.

    Any thread may be the first to ask: the kernels are registered once.
    """
    with _lock:
        return _load()


def ffi_version() -> int:
    """1000 · major + minor version of XLA's calls in the jaxlib that is here, by its headers; it takes libraries of no later one."""
    text = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text(encoding="utf-8")
    found = dict(re.findall(r"^#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text, re.MULTILINE))
    return 1000 * int(found["MAJOR"]) + int(found["MINOR"])


@functools.cache
def _load() -> ctypes.CDLL | None:
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
        return loaded
    return None
