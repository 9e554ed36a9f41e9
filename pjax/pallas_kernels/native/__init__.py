"""The library of native CPU kernels, built when pjax is installed where a C++ compiler is."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
import threading
from pathlib import Path

import jax

log = logging.getLogger(__name__)

ATTENTION = "pjax_paged_attention"
KV_WRITE = "pjax_kv_write"
PRODUCT = "pjax_product"
RESERVE = "pjax_reserve"
MISSING = "was not built, or does not load: install a C++ compiler, then pjax again"
SYMBOLS = {ATTENTION: "PjaxPagedAttention", KV_WRITE: "PjaxKvWrite", PRODUCT: "PjaxProduct", RESERVE: "PjaxReserve"}


_lock = threading.Lock()


def library() -> ctypes.CDLL | None:
    """The library, with its kernels registered for XLA's calls by the names above; None where it was not built or XLA does not take it.

    Any thread may be the first to ask: the kernels are registered once.
    """
    with _lock:
        return _load()


@functools.cache
def _load() -> ctypes.CDLL | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_library{suffix}")
        if not path.exists():
            continue
        try:
            loaded = ctypes.cdll.LoadLibrary(str(path))
            for advise in (loaded.PjaxUseLargePages, loaded.PjaxTouch):
                advise.argtypes, advise.restype = [ctypes.c_void_p, ctypes.c_uint64], None
            loaded.PjaxCopyWeights.argtypes = [ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64]
            loaded.PjaxCopyWeights.restype = ctypes.c_int64
            for target, symbol in SYMBOLS.items():
                jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(loaded, symbol)), platform="cpu")
        except Exception as error:  # built for another jaxlib, or from other sources: the XLA forms serve as well
            log.warning("the native CPU kernels in %s do not load, XLA is used instead; installing pjax again builds them: %s", path, error)
            return None
        return loaded
    return None
