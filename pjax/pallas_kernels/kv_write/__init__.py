"""Where a step's keys and values go, made once a step; every layer writes through it.

XLA scatters the rows: in place on CPUs and GPUs, one after the other on a TPU. There a kernel writes aligned groups of
rows, several in flight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax

from pjax.pallas_kernels.paged_attention.batch import RaggedBatch
from pjax.pallas_kernels.paged_attention.checks import check_values, is_debug
from pjax.pallas_kernels.pages import check_rows, write_kv


class WriteTargets(Protocol):
    """`SlotTargets` or, on a TPU, `tpu.GroupTargets`."""

    def write(self, pages: jax.Array, keys: jax.Array, values: jax.Array, page_offset: int | jax.Array) -> jax.Array:
        """The pool with keys and values [T, K, H] of the packed tokens written, `page_offset` added to every page id."""
        ...


def write_targets(batch: RaggedBatch, pages: jax.Array, num_tokens: int, *, backend: str | None = None) -> WriteTargets:
    """Targets of T packed tokens in the pool `[P, G, 2·K·H]`.

    Args:
      backend: "tpu" for the kernel, "xla" for the scatter; by default the kernel on TPUs where it takes the pages.

    Raises ValueError for wrong shapes, NotImplementedError when the kernel is named and does not take the pages.
    """
    if backend not in (None, "tpu", "xla"):
        raise ValueError(f"backend of the KV write is {backend!r}, but must be 'tpu' or 'xla'")
    if pages.ndim != 3 or num_tokens < 1:
        raise ValueError(f"pages has shape {pages.shape} and num_tokens is {num_tokens}, but must be [P, G, 2·K·H] and >= 1")
    if is_debug():
        check_values(batch, num_tokens=num_tokens, num_pages=pages.shape[0], page_size=pages.shape[1])
    if backend == "tpu" or (backend is None and jax.default_backend() == "tpu"):
        from pjax.pallas_kernels.kv_write.tpu import GroupTargets, why_not

        reason = why_not(pages.shape[1], pages.dtype)
        if reason and backend:
            raise NotImplementedError(f"backend 'tpu' of the KV write {reason}; 'xla' takes any")
        backend = "xla" if reason else "tpu"
    if backend == "tpu":
        return GroupTargets.of(batch, num_tokens, page_size=pages.shape[1], dtype=pages.dtype)
    num_slots = pages.shape[0] * pages.shape[1]
    return SlotTargets(batch.token_slots(num_tokens, pages.shape[1], num_slots))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotTargets:
    """A slot for each token; XLA scatters."""

    slots: jax.Array  # int32 [T]; past the end of the pool for padding

    def write(self, pages: jax.Array, keys: jax.Array, values: jax.Array, page_offset: int | jax.Array) -> jax.Array:
        """See `WriteTargets`."""
        check_rows(pages, keys, values, self.slots.shape[0])
        return write_kv(pages, keys, values, self.slots + page_offset * pages.shape[1])
