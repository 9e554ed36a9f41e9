"""The page pool's layout and memory. Only the kernels of paged_attention know the layout besides.

One array holds the pages of all layers: `[L·P, G, 2·K·H]`. Page `p` of layer `l` is row `l·P + p`; within a page one
dense row per token holds the keys of all KV heads and then their values. Dense rows keep every head size at its native
size in memory, on a TPU's tiles too; keys side by side let one product there score all heads (docs/decisions/0004-page-layout.md).

Inside a row:   | K of head 0 (H) | K of head 1 (H) | ... | V of head 0 (H) | V of head 1 (H) | ...
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.typing import DTypeLike

from pjax import native

TOUCHED_AT_ONCE = 64 << 20  # bytes; between two such pieces it may be ended


def pool_shape(num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_size: int) -> tuple[int, int, int]:
    """Shape of the pool, `[L·P, G, 2·K·H]`."""
    return num_layers * num_pages, page_size, 2 * num_kv_heads * head_size


def pool_format(sharding: jax.sharding.Sharding) -> Format:
    """The pool's order in memory, for `jax.jit` and `ShapeDtypeStruct`: as its axes say.

    Left to itself, XLA may choose another for an argument on a TPU when a row is not a multiple of 128 numbers, and copy the
    whole pool to turn it round.
    """
    return Format(Layout(major_to_minor=(0, 1, 2)), sharding)


def new_pool(shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """A pool whose pages nobody owns; to be jitted.

    Zeros on accelerators. On a CPU with the native kernels it is memory that nobody has touched: the system gives it page by page as
    tokens are written, where filling gigabytes takes seconds. No kernel reads what is not owned.
    """

    def zeros() -> jax.Array:
        return jnp.zeros(shape, dtype)

    def untouched() -> jax.Array:
        pool: jax.Array = jax.ffi.ffi_call(native.RESERVE, jax.ShapeDtypeStruct(shape, dtype))()
        return pool

    return zeros() if native.library() is None else lax.platform_dependent(cpu=untouched, default=zeros)


def use_large_pages(pool: jax.Array) -> None:
    """Asks the system to back a CPU's pool with its large pages from now on (2 MiB; the pool's pages are some KiB).

    A step of 32 rows with contexts of 500 tokens takes a sixth less time so. A short prompt is better off without: its tokens lie in every
    layer's part of the pool, and each would cost a large page's zeros before the first token comes.
    """
    if (library := _library_of(pool)) is not None:
        for share in pool.addressable_shards:
            library.PjaxUseLargePages(share.data.unsafe_buffer_pointer(), share.data.nbytes)


@contextmanager
def touching(pool: jax.Array) -> Iterator[None]:
    """While this lasts, and until it is done, a thread has the system give a CPU's pool all of its memory; what was written stays.

    Where the host of a virtual machine has to find it first, that takes seconds for each GiB (docs/decisions/0014-start-up.md): better
    before the first request than in its steps. An exception ends it early. The pool must not be given away meanwhile.
    """
    stop = Event()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="pjax-touch") as thread:
        touched = thread.submit(_touch, pool, stop)
        try:
            yield
        except BaseException:
            stop.set()
            raise
        touched.result()


def _touch(pool: jax.Array, stop: Event) -> None:
    if (library := _library_of(pool)) is None:
        return
    for share in pool.addressable_shards:
        first, size = share.data.unsafe_buffer_pointer(), share.data.nbytes
        for at in range(0, size, TOUCHED_AT_ONCE):
            if stop.is_set():
                return
            library.PjaxTouch(first + at, min(TOUCHED_AT_ONCE, size - at))


def _library_of(pool: jax.Array) -> ctypes.CDLL | None:
    return native.library() if next(iter(pool.devices())).platform == "cpu" else None


def page_bytes(num_layers: int, page_size: int, num_kv_heads: int, head_size: int, dtype: DTypeLike) -> int:
    """Bytes that one page costs over all layers: `2·L·G·K·H·itemsize`."""
    return 2 * num_layers * page_size * num_kv_heads * head_size * jnp.dtype(dtype).itemsize


def check_rows(pages: jax.Array, keys: jax.Array, values: jax.Array, num_tokens: int) -> None:
    """Raises ValueError when keys and values are not [T, K, H] of numbers that fit the pool's rows."""
    for name, array in (("keys", keys), ("values", values)):
        if array.ndim != 3 or array.shape != keys.shape or array.shape[0] != num_tokens or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}, but must be floating [T, K, H] with T {num_tokens}, "
                f"like the keys {list(keys.shape)}"
            )
    if pages.ndim != 3 or pages.shape[2] != 2 * keys.shape[1] * keys.shape[2]:
        raise ValueError(f"pages has shape {list(pages.shape)}, but must be [P, G, 2·K·H] of keys and values {list(keys.shape)}")


def kv_rows(keys: jax.Array, values: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The pool's rows [T, 2·K·H] of keys and values [T, K, H]."""
    return jnp.stack([keys, values], axis=1).reshape(keys.shape[0], -1).astype(dtype)


def write_kv(pages: jax.Array, keys: jax.Array, values: jax.Array, slots: jax.Array) -> jax.Array:
    """The pool with the keys and values of T tokens written at their slots; in place when `pages` is donated.

    Args:
      pages: [L·P, G, 2·K·H].
      keys, values: [T, K, H], cast to the pool's dtype.
      slots: int32 [T]: page · G + offset in the page. A slot past the end of the pool is padding and is not written.
    """
    flat = pages.reshape(-1, pages.shape[-1])
    return flat.at[slots].set(kv_rows(keys, values, pages.dtype), mode="drop").reshape(pages.shape)


def read_kv(pages: jax.Array, page_ids: jax.Array, num_kv_heads: int) -> jax.Array:
    """Keys and values of whole pages.

    Args:
      pages: [L·P, G, 2·K·H].
      page_ids: int32 [..., B]; they must be in range.

    Returns:
      [..., B·G, 2, K, H]: keys at index 0 of the axis of two, values at index 1.
    """
    page_size, width = pages.shape[1:]
    num_tokens = page_ids.shape[-1] * page_size
    rows = pages.at[page_ids].get(mode="clip")
    return rows.reshape(*page_ids.shape[:-1], num_tokens, 2, num_kv_heads, width // (2 * num_kv_heads))
