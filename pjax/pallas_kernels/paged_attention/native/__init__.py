"""The native CPU kernel: paged_attention.cc, built when pjax is installed where a C++ compiler is."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pjax.pallas_kernels.paged_attention.batch import RaggedBatch

log = logging.getLogger(__name__)

TARGET = "pjax_paged_attention"
HEAD_SIZES = (64, 80, 96, 112, 128, 256)


@functools.cache
def is_available() -> bool:
    """Whether the library was built and XLA takes it."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_library{suffix}")
        if not path.exists():
            continue
        try:
            library = ctypes.cdll.LoadLibrary(str(path))
            jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.PjaxPagedAttention), platform="cpu")
        except Exception as error:  # built for another jaxlib: the XLA form serves as well
            log.warning("the native CPU kernel %s does not load, XLA is used instead: %s", path, error)
            return False
        return True
    return False


def supports(q: jax.Array, pages: jax.Array) -> bool:
    """Whether dtypes and head size are ones that the kernel has."""
    return q.dtype == jnp.float32 and pages.dtype == jnp.float32 and q.shape[-1] in HEAD_SIZES


def paged_attention_native(
    q: jax.Array,
    pages: jax.Array,
    batch: RaggedBatch,
    *,
    num_kv_heads: int,
    scale: float,
    sliding_window: int | None = None,
    logit_softcap: float | None = None,
) -> jax.Array:
    """Attention of each packed token over its own sequence's pages, on CPUs. See `paged_attention` for arguments.

    float32 only, head sizes of `HEAD_SIZES`. Padding gives zeros.
    """
    if not is_available():
        raise RuntimeError("attention backend 'native' was not built: install pjax where a C++ compiler is, or use 'xla'")
    if not supports(q, pages):
        shown = ", ".join(map(str, HEAD_SIZES))
        raise ValueError(
            f"attention backend 'native' takes float32 and head sizes {shown}, but q is {q.dtype} of {q.shape[-1]} and pages are "
            f"{pages.dtype}; 'xla' takes any"
        )
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(q.shape, q.dtype))
    return call(
        q,
        pages,
        batch.row_starts,
        batch.kv_lens,
        batch.block_tables,
        num_kv_heads=np.int64(num_kv_heads),
        scale=np.float32(scale),
        window=np.int64(sliding_window or 0),
        softcap=np.float32(logit_softcap or 0),
    )
