"""Where a step's keys and values go, made once a step; every layer writes through it.

XLA scatters the rows: in place on CPUs and GPUs, one after the other on a TPU. There a kernel writes aligned groups of
rows, several in flight. On CPUs a native kernel writes each row in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

from pjax.pallas_kernels.kv_write import native
from pjax.pallas_kernels.paged_attention.checks import check_values, is_debug
from pjax.pallas_kernels.paged_attention.ragged_batch import RaggedBatch
from pjax.pallas_kernels.pages import check_rows, write_kv


class WriteTargets(Protocol):
    """`SlotTargets` or, on a TPU, `tpu.GroupTargets`."""

    def write(self, pages: jax.Array, keys: jax.Array, values: jax.Array, page_offset: int | jax.Array) -> jax.Array:
        """The pool with keys and values [T, K, H] of the packed tokens written, `page_offset` added to every page id."""
        ...


def write_targets(batch: RaggedBatch, pages: jax.Array, num_tokens: int, *, backend: str | None = None) -> WriteTargets:
    """Targets of T packed tokens in the pool `[P, G, 2·K·H]`.

    Args:
      backend: "tpu" or "native" (CPU) for the kernels, "xla" for the scatter; by default the platform's kernel where it takes the pages.

    Raises ValueError for wrong shapes, NotImplementedError when the kernel is named and does not take the pages.
    """
    if backend not in (None, "native", "tpu", "xla"):
        raise ValueError(f"backend of the KV write is {backend!r}, but must be 'native', 'tpu' or 'xla'")
    if pages.ndim != 3 or num_tokens < 1:
        raise ValueError(f"pages has shape {pages.shape} and num_tokens is {num_tokens}, but must be [P, G, 2·K·H] and >= 1")
    if is_debug():
        check_values(batch, num_tokens=num_tokens, num_pages=pages.shape[0], page_size=pages.shape[1])
    page_size = pages.shape[1]
    chosen = backend or {"cpu": "native", "tpu": "tpu"}.get(jax.default_backend(), "xla")
    reason = _why_not(chosen, page_size, pages.dtype)
    if reason and backend:
        raise NotImplementedError(f"backend {backend!r} of the KV write {reason}; 'xla' takes any")
    if chosen == "tpu" and not reason:
        from pjax.pallas_kernels.kv_write.tpu import GroupTargets

        return GroupTargets.of(batch, num_tokens, page_size=page_size, dtype=pages.dtype)
    slots = batch.token_slots(num_tokens, page_size, pages.shape[0] * page_size)
    return SlotTargets(slots, is_native=chosen == "native" and not reason)


def _why_not(backend: str, page_size: int, dtype: Any) -> str | None:
    if backend == "tpu":
        from pjax.pallas_kernels.kv_write import tpu  # not on top: it imports Pallas

        return tpu.why_not(page_size, dtype)
    return native.why_not(dtype) if backend == "native" else None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotTargets:
    """A slot for each token; XLA scatters, or the native kernel writes."""

    slots: jax.Array  # int32 [T]; past the end of the pool for padding
    is_native: bool = field(default=False, metadata={"static": True})

    def write(self, pages: jax.Array, keys: jax.Array, values: jax.Array, page_offset: int | jax.Array) -> jax.Array:
        """See `WriteTargets`."""
        check_rows(pages, keys, values, self.slots.shape[0])
        write = native.write_kv if self.is_native else write_kv
        return write(pages, keys, values, self.slots + page_offset * pages.shape[1])
