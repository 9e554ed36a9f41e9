"""The KV write for CPUs: native/kv_write.cc, one pass over the rows, in the pool's own place."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pjax.native import KV_WRITE, MISSING, library


def why_not(dtype: Any) -> str | None:
    """The reason why the kernel can't write such pages, or None."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"takes pages of float32 or bfloat16, but they are {jnp.dtype(dtype)}"
    return None if library() is not None else MISSING


def write_kv(pages: jax.Array, keys: jax.Array, values: jax.Array, slots: jax.Array) -> jax.Array:
    """As `pjax.pallas_kernels.pages.write_kv`, for pages that `why_not` has nothing against."""
    if keys.dtype != values.dtype or keys.dtype not in (jnp.float32, jnp.bfloat16):
        keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
    call = jax.ffi.ffi_call(KV_WRITE, jax.ShapeDtypeStruct(pages.shape, pages.dtype), input_output_aliases={3: 0})
    written: jax.Array = call(keys, values, slots, pages)
    return written
