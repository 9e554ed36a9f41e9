"""The one door to paged attention: validates, picks a backend, calls it."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from typing import Any

import jax
import jax.numpy as jnp

from pjax.pallas_kernels.paged_attention.checks import check_values, is_debug
from pjax.pallas_kernels.paged_attention.options import AttentionOptions
from pjax.pallas_kernels.paged_attention.ragged_batch import RaggedBatch

log = logging.getLogger(__name__)

# Each backend's module has `attend(q, pages, batch, options)`, and `why_not(q, pages, options)`, which gives the reason
# why it can't serve these arguments. Imported when it is first asked, since Pallas takes a while.
BACKENDS = ("native", "tpu", "triton", "mosaic_gpu", "xla", "reference")  # as their modules are called
PREFERRED = {"cpu": ("native",), "tpu": ("tpu",), "gpu": ("triton",)}  # by platform, best first; after them XLA, which takes everything
PACKAGE = "pjax.pallas_kernels.paged_attention"
BACKEND_VARIABLE = "PJAX_ATTENTION_BACKEND"
DTYPES = ("float32", "bfloat16", "float16")


def paged_attention(
    q: jax.Array,
    pages: jax.Array,
    batch: RaggedBatch,
    *,
    num_kv_heads: int,
    scale: float | jax.Array | None = None,
    sliding_window: int | jax.Array | None = None,
    logit_softcap: float | jax.Array | None = None,
    sinks: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Attention of each packed token over its own sequence's pages.

    Args:
      q: [T, N, H]: packed queries, float32, bfloat16 or float16.
      pages: [P, G, 2·K·H]: the page pool (see `pjax.pallas_kernels.pages`); the tokens' own K and V are in it already.
      batch: who owns which tokens and pages.
      num_kv_heads: K; divides N.
      scale: multiplies the logits; H ** -0.5 by default.
      sliding_window: a token sees itself and the `sliding_window - 1` tokens before it; None: all before it.
      logit_softcap: logits become `c · tanh(logits / c)`.
      sinks: float [N]: for each query head a logit that takes its part of the softmax and has no value.
      backend: "native" (CPU, pages of float32 or bfloat16), "tpu", "triton" (GPU), "mosaic_gpu" (Hopper), "xla" or "reference"; by default
        what the environment's PJAX_ATTENTION_BACKEND says, else the fastest that takes these arguments on this platform.

    `scale`, `sliding_window` and `logit_softcap` may be arrays of one number, float32, int32 and float32, which are chosen by a traced
    layer, say; then a window of 2**30 sees all, and an infinite cap is none. "xla" and "reference" take arrays and sinks; other backends
    refuse them by name.

    With PJAX_DEBUG=1 in the environment the batch's values are checked too (see `check_values`).

    Returns:
      [T, N, H] in q's dtype. Padding tokens give zeros.

    Raises:
      ValueError: shapes or dtypes do not fit; the message names the argument, its value and the bound.
      NotImplementedError: the backend that was named does not take these arguments; the message says why.
    """
    _check(q, pages, batch, num_kv_heads)
    _check_options(q, scale=scale, sliding_window=sliding_window, logit_softcap=logit_softcap, sinks=sinks)
    if is_debug():
        check_values(batch, num_tokens=q.shape[0], num_pages=pages.shape[0], page_size=pages.shape[1])
    if isinstance(sliding_window, int) and sliding_window >= batch.block_tables.shape[1] * pages.shape[1]:
        sliding_window = None  # nothing is that far
    options = AttentionOptions(
        num_kv_heads=num_kv_heads,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        sliding_window=sliding_window,
        logit_softcap=logit_softcap,
        sinks=sinks,
    )
    name = backend or os.environ.get(BACKEND_VARIABLE)
    chosen = _named(name, q, pages, options) if name else _fastest(q, pages, options)
    out: jax.Array = chosen.attend(q, pages, batch, options)
    return out


def _module(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.{name}")


def _named(name: str, q: jax.Array, pages: jax.Array, options: AttentionOptions) -> Any:
    if name not in BACKENDS:
        raise ValueError(f"attention backend is {name!r}, but must be one of {', '.join(sorted(BACKENDS))}")
    module = _module(name)
    reason = module.why_not(q, pages, options)
    if reason:
        raise NotImplementedError(f"attention backend {name!r} {reason}; 'xla' takes any")
    return module


def _fastest(q: jax.Array, pages: jax.Array, options: AttentionOptions) -> Any:
    platform = jax.default_backend()
    reasons = []
    for name in PREFERRED.get(platform, ()):
        module = _module(name)
        reason = module.why_not(q, pages, options)
        if reason is None:
            return module
        reasons.append(f"{name!r} {reason}")
    _say_once(platform, "; ".join(reasons) or "it has no kernel of its own")
    return _module("xla")


@functools.cache
def _say_once(platform: str, reasons: str) -> None:
    level = logging.INFO if platform == "cpu" else logging.WARNING
    log.log(level, "paged attention on %s goes through XLA, not through a kernel: %s", platform, reasons)


def _check(q: jax.Array, pages: jax.Array, batch: RaggedBatch, num_kv_heads: int) -> None:
    if q.ndim != 3:
        raise ValueError(f"q has shape {q.shape}, but must be [T, N, H]")
    if pages.ndim != 3:
        raise ValueError(f"pages has shape {pages.shape}, but must be [P, G, 2·K·H]")
    for name, array in (("q", q), ("pages", pages)):
        if jnp.dtype(array.dtype).name not in DTYPES:
            raise ValueError(f"{name} has dtype {array.dtype}, but must be one of {', '.join(DTYPES)}")
        if 0 in array.shape:
            raise ValueError(f"{name} has shape {array.shape}, but must have at least one of everything")
    num_heads, head_size = q.shape[1:]
    if not isinstance(num_kv_heads, int) or isinstance(num_kv_heads, bool):
        raise ValueError(f"num_kv_heads is {num_kv_heads!r}, but must be an integer")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads is {num_kv_heads}, but must divide the {num_heads} query heads of q")
    if pages.shape[2] != 2 * num_kv_heads * head_size:
        raise ValueError(
            f"pages has rows of {pages.shape[2]}, but must have 2·K·H = {2 * num_kv_heads * head_size} (K {num_kv_heads}, H {head_size})"
        )
    for field in ("row_starts", "kv_lens", "block_tables", "num_decode"):
        if not hasattr(getattr(batch, field), "shape") or (field != "num_decode" and 0 in getattr(batch, field).shape):
            raise ValueError(f"batch.{field} is {getattr(batch, field)!r}, but must be an int32 array of at least one row and page")
    rows = batch.kv_lens.shape[0]
    shapes = {"row_starts": (rows + 1,), "kv_lens": (rows,), "block_tables": (rows, batch.block_tables.shape[-1]), "num_decode": ()}
    for field, shape in shapes.items():
        array = getattr(batch, field)
        if tuple(array.shape) != shape or array.dtype != jnp.int32:
            raise ValueError(f"batch.{field} is {array.dtype}{list(array.shape)}, but must be int32{list(shape)}")


def _check_options(q: jax.Array, **options: Any) -> None:
    for name, dtype in (("scale", jnp.float32), ("sliding_window", jnp.int32), ("logit_softcap", jnp.float32)):
        array = options[name]
        if isinstance(array, jax.Array) and (array.shape != () or array.dtype != dtype):
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, but must be a number or {dtype.__name__}[]")
    window, softcap, sinks = (options[name] for name in ("sliding_window", "logit_softcap", "sinks"))
    if not isinstance(window, jax.Array | None):
        if not isinstance(window, int) or isinstance(window, bool):
            raise ValueError(f"sliding_window is {window!r}, but must be an integer")
        if window < 1:
            raise ValueError(f"sliding_window is {window}, but must be >= 1")
    if not isinstance(softcap, jax.Array | None) and not softcap > 0:
        raise ValueError(f"logit_softcap is {softcap}, but must be > 0")
    if sinks is not None and (
        not isinstance(sinks, jax.Array) or sinks.shape != q.shape[1:2] or not jnp.issubdtype(sinks.dtype, jnp.floating)
    ):
        shown = f"{sinks.dtype}{list(sinks.shape)}" if isinstance(sinks, jax.Array) else repr(sinks)
        raise ValueError(f"sinks is {shown}, but must be floating [{q.shape[1]}], one for each query head")
