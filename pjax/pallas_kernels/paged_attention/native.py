"""The native CPU kernel: native/paged_attention.cc."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pjax.native import ATTENTION, MISSING, library
from pjax.pallas_kernels.paged_attention.options import AttentionOptions
from pjax.pallas_kernels.paged_attention.ragged_batch import RaggedBatch

HEAD_SIZES = (64, 80, 96, 112, 128, 256)


def why_not(q: jax.Array, pages: jax.Array, options: AttentionOptions) -> str | None:
    """The reason why the kernel can't be used for these arguments, or None."""
    if reason := options.why_not_numbers():
        return reason
    if pages.dtype not in (jnp.float32, jnp.bfloat16) or q.shape[-1] not in HEAD_SIZES:
        shown = ", ".join(map(str, HEAD_SIZES))
        return f"takes pages of float32 or bfloat16 and head sizes {shown}, but q has heads of {q.shape[-1]} and pages are {pages.dtype}"
    return None if library() is not None else MISSING


def attend(q: jax.Array, pages: jax.Array, batch: RaggedBatch, options: AttentionOptions) -> jax.Array:
    """Attention of each packed token over its own sequence's pages, on CPUs. See `paged_attention` for arguments.

    Pages of float32 or bfloat16, head sizes of `HEAD_SIZES`; computed in float32. Padding gives zeros.
    """
    call = jax.ffi.ffi_call(ATTENTION, jax.ShapeDtypeStruct(q.shape, jnp.float32))
    out: jax.Array = call(
        q.astype(jnp.float32),
        pages,
        batch.row_starts,
        batch.kv_lens,
        batch.block_tables,
        num_kv_heads=np.int64(options.num_kv_heads),
        scale=np.float32(options.scale),
        window=np.int64(options.sliding_window or 0),
        softcap=np.float32(options.logit_softcap or 0),
    )
    return out.astype(q.dtype)
