"""What a model's attention layer calls: writes the step's keys and values into the pages, then attends over them."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from pjax.pallas_kernels import RaggedBatch, paged_attention
from pjax.pallas_kernels.pages import write_kv


@dataclass(frozen=True, kw_only=True)
class PagedContext:
    """One step's batch as every layer sees it. Made once a step, outside the layers."""

    batch: RaggedBatch
    positions: jax.Array  # int32 [T]
    slots: jax.Array  # int32 [T], of layer 0; past the end of the whole pool for padding
    num_pages: int  # pages of one layer
    backend: str | None = None

    @classmethod
    def make(cls, batch: RaggedBatch, pages: jax.Array, num_tokens: int, num_layers: int, backend: str | None = None) -> PagedContext:
        """For T packed tokens and a pool [L·P, G, 2·K·H]."""
        page_size = pages.shape[1]
        num_slots = pages.shape[0] * page_size
        slots = batch.token_slots(num_tokens, page_size, num_slots)
        return cls(
            batch=batch,
            positions=batch.token_positions(num_tokens),
            slots=slots,
            num_pages=pages.shape[0] // num_layers,
            backend=backend,
        )

    def attend(
        self, pages: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, layer: int | jax.Array, *, sliding_window: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Writes k, v [T, K, H] as layer `layer` and attends with q [T, N, H]; returns ([T, N, H], pages)."""
        offset = layer * self.num_pages
        pages = write_kv(pages, k, v, self.slots + offset * pages.shape[1])
        batch = self.batch.offset_pages(offset)
        out = paged_attention(q, pages, batch, num_kv_heads=k.shape[1], sliding_window=sliding_window, backend=self.backend)
        return out, pages
