"""Pages that leave the pool for host memory and come back, beside the steps."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Executor, Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Ints = npt.NDArray[np.int32]

COPY_SIZES = (4, 16, 64)  # pages of one copy; fewer are padded
MAX_ARRIVING = 8  # copies on their way to the host whose pages the device still holds


class PageSwap:
    """Host memory for pages of all layers, and compiled copies of a few sizes.

    A copy out is a gather, dispatched before the step that writes the pages anew, so the device orders them; its result goes
    to the host while later steps run. A copy in is a transfer to the device and a scatter into the pool.

    Args:
      num_slots: pages that the host memory holds. It is touched only as it fills.
      pool: shape [L·P, G, W], dtype and sharding of the page pool.
      pool_format: the pool's order in memory.
    """

    def __init__(self, num_slots: int, num_layers: int, pool: jax.ShapeDtypeStruct, pool_format: Any) -> None:
        self._pool_struct = pool
        rows, page_size, width = pool.shape
        self._page_shape = (num_layers, page_size, width)
        self._num_pages = rows // num_layers
        self._arriving: deque[tuple[Ints, jax.Array]] = deque()
        # Pages on the host are whole rows of all devices; on their way each device sends and gets its own.
        self._data_sharding = pool_format.sharding
        if isinstance(pool_format.sharding, NamedSharding):
            self._data_sharding = NamedSharding(pool_format.sharding.mesh, PartitionSpec(None, *pool_format.sharding.spec))
        # Of several hosts each keeps what its own devices hold.
        own = own_width((1, *self._page_shape), self._data_sharding)
        self._host = np.empty((num_slots, *self._page_shape[:-1], own), pool.dtype)
        self._out = jax.jit(self._gather, out_shardings=self._data_sharding)
        self._in = jax.jit(self._scatter, donate_argnums=0, out_shardings=pool_format)
        self._compiled: dict[int, Future[tuple[Any, Any]]] = {}

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far."""
        return 2 * sum(compiled.done() for compiled in self._compiled.values())

    @property
    def is_compiled(self) -> bool:
        """Whether all copies are compiled, so that `apply` compiles nothing."""
        return len(self._compiled) == len(COPY_SIZES) and all(compiled.done() for compiled in list(self._compiled.values()))

    def _gather(self, pages: jax.Array, page_ids: jax.Array) -> jax.Array:
        """Pages [n, L, G, W] of the pool [L·P, G, W]."""
        by_layer = pages.reshape(self._page_shape[0], self._num_pages, *pages.shape[1:])
        return jnp.moveaxis(by_layer.at[:, page_ids].get(mode="clip"), 1, 0)

    def _scatter(self, pages: jax.Array, page_ids: jax.Array, data: jax.Array, count: jax.Array) -> jax.Array:
        """The pool with its pages overwritten by the first `count` of `data` [n, L, G, W], in place."""

        def copy(index: jax.Array, pool: jax.Array) -> jax.Array:
            page = lax.dynamic_slice_in_dim(data, index, 1, axis=0)
            return lax.dynamic_update_slice_in_dim(pool, jnp.moveaxis(page, 0, 1), page_ids[index], axis=1)

        by_layer = pages.reshape(self._page_shape[0], self._num_pages, *pages.shape[1:])
        return lax.fori_loop(0, count, copy, by_layer).reshape(pages.shape)

    def prefetch(self, executor: Executor) -> None:
        """Starts compiling all copies in the background."""
        for size in COPY_SIZES:
            if size not in self._compiled:
                self._compiled[size] = executor.submit(self._compile, size)

    def _compile(self, size: int) -> tuple[Any, Any]:
        ids = jax.ShapeDtypeStruct((size,), jnp.int32)
        data = jax.ShapeDtypeStruct((size, *self._page_shape), self._pool_struct.dtype, sharding=self._data_sharding)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        return self._out.lower(self._pool_struct, ids).compile(), self._in.lower(self._pool_struct, ids, data, count).compile()

    def _copies(self, size: int) -> tuple[Any, Any]:
        if size not in self._compiled:
            done: Future[tuple[Any, Any]] = Future()
            done.set_result(self._compile(size))
            self._compiled[size] = done
        return self._compiled[size].result()

    def warmup(self) -> None:
        """Waits until all copies are compiled."""
        for size in COPY_SIZES:
            self._copies(size)

    def apply(self, pages: jax.Array, outs: Ints, ins: Ints) -> jax.Array:
        """The pool after a plan's copies, all of those out before those in; returns before they are done.

        Args:
          pages: the pool; given away.
          outs: int32 [o, 2], from page to slot.
          ins: int32 [i, 2], from slot to page.
        """
        while self._arriving and (len(self._arriving) > MAX_ARRIVING or self._arriving[0][1].is_ready()):  # type: ignore[attr-defined]  # jax.Array does not declare it
            self._settle()
        for chunk, size in _chunks(outs):
            batch = self._copies(size)[0](pages, _padded(chunk[:, 0], size))
            batch.copy_to_host_async()
            self._arriving.append((chunk[:, 1], batch))
        if len(ins):
            wanted = set(ins[:, 0].tolist())
            while any(wanted.intersection(slots.tolist()) for slots, _ in self._arriving):
                self._settle()
        for chunk, size in _chunks(ins):
            data = self._put(self._host[_padded(chunk[:, 0], size)])  # indexing copies, so the slots are free from here on
            pages = self._copies(size)[1](pages, _padded(chunk[:, 1], size), data, np.int32(len(chunk)))
        return pages

    def _settle(self) -> None:
        """Writes the oldest copy out to its slots. Copies settle in their order: a slot may have been given anew."""
        slots, batch = self._arriving.popleft()
        self._host[slots] = own_part(batch)[: len(slots)]

    def _put(self, rows: npt.NDArray[Any]) -> jax.Array:
        """Pages on their way to the devices: this host's part of them."""
        if self._data_sharding.is_fully_addressable:
            return jax.device_put(rows, self._data_sharding)
        return jax.make_array_from_process_local_data(self._data_sharding, rows, (len(rows), *self._page_shape))

    def forget(self) -> None:
        """Drops what is on its way."""
        self._arriving.clear()

    def measure(self, pages: jax.Array) -> tuple[jax.Array, int, float]:
        """The pool unchanged, a number of pages, and the seconds that a copy of so many takes one way."""
        count = min(COPY_SIZES[-1], self._num_pages, len(self._host))
        numbers = np.arange(count, dtype=np.int32)
        both = np.stack([numbers, numbers], axis=1)
        for _ in range(2):  # the first touches the memory
            jax.block_until_ready(pages)
            started = time.perf_counter()
            pages = jax.block_until_ready(self.apply(pages, both, both))
            seconds = time.perf_counter() - started
        return pages, count, seconds / 2


def own_width(shape: tuple[int, ...], sharding: Any) -> int:
    """How much of the last dimension this host's devices hold."""
    if sharding.is_fully_addressable:
        return shape[-1]
    spans = {index[-1].indices(shape[-1])[:2] for index in sharding.addressable_devices_indices_map(shape).values()}
    return sum(end - start for start, end in spans)


def own_part(array: jax.Array) -> npt.NDArray[Any]:
    """What of an array this host's devices hold, one after the other in its last dimension."""
    if array.is_fully_addressable:
        return np.asarray(array)
    parts = {shard.index[-1].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)], axis=-1)


def _chunks(pairs: Ints) -> list[tuple[Ints, int]]:
    chunks = []
    while len(pairs):
        size = next((size for size in COPY_SIZES if size >= len(pairs)), COPY_SIZES[-1])
        chunks.append((pairs[:size], size))
        pairs = pairs[size:]
    return chunks


def _padded(numbers: Ints, size: int) -> Ints:
    return np.concatenate([numbers, np.zeros(size - len(numbers), np.int32)])
