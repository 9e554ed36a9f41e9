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
from pjax.pallas_kernels.paged_attention.options import AttentionOptions

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


def why_not(q: jax.Array, pages: jax.Array, options: AttentionOptions) -> str | None:
    """The reason why the kernel can't be used for these arguments, or None."""
    if q.dtype != jnp.float32 or pages.dtype != jnp.float32 or q.shape[-1] not in HEAD_SIZES:
        shown = ", ".join(map(str, HEAD_SIZES))
        return f"takes float32 and head sizes {shown}, but q is {q.dtype} of {q.shape[-1]} and pages are {pages.dtype}"
    return None if is_available() else "was not built: install pjax where a C++ compiler is"


def attend(q: jax.Array, pages: jax.Array, batch: RaggedBatch, options: AttentionOptions) -> jax.Array:
    """Attention of each packed token over its own sequence's pages, on CPUs. See `paged_attention` for arguments.

    float32 only, head sizes of `HEAD_SIZES`. Padding gives zeros.
    """
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(q.shape, q.dtype))
    return call(
        q,
        pages,
        batch.row_starts,
        batch.kv_lens,
        batch.block_tables,
        num_kv_heads=np.int64(options.num_kv_heads),
        scale=np.float32(options.scale),
        window=np.int64(options.sliding_window or 0),
        softcap=np.float32(options.logit_softcap or 0),
    )
