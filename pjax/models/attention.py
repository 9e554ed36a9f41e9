"""What a model's attention layer calls: writes the step's keys and values into the pages, then attends over them."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from pjax.pallas_kernels import RaggedBatch, paged_attention
from pjax.pallas_kernels.kv_write import WriteTargets, write_targets


@dataclass(frozen=True, kw_only=True)
class PagedContext:
    """One step's batch as every layer sees it. Made once a step, outside the layers."""

    batch: RaggedBatch
    positions: jax.Array  # int32 [T]
    targets: WriteTargets  # of layer 0
    num_pages: int  # pages of one layer
    backend: str | None = None

    @property
    def num_tokens(self) -> jax.Array:
        """int32 []: how many of the T tokens are not padding."""
        return self.batch.row_starts[-1]

    @classmethod
    def make(cls, batch: RaggedBatch, pages: jax.Array, num_tokens: int, num_layers: int, backend: str | None = None) -> PagedContext:
        """For T packed tokens and a pool [L·P, G, 2·K·H]."""
        return cls(
            batch=batch,
            positions=batch.token_positions(num_tokens),
            targets=write_targets(batch, pages, num_tokens, backend=backend if backend in (None, "native", "tpu") else "xla"),
            num_pages=pages.shape[0] // num_layers,
            backend=backend,
        )

    def attend(
        self,
        pages: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        layer: int | jax.Array,
        *,
        scale: float | None = None,
        sliding_window: int | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Writes k, v [T, K, H] as layer `layer` and attends with q [T, N, H]; returns ([T, N, H], pages).

        `scale` multiplies the logits, H ** -0.5 by default.
        """
        offset = layer * self.num_pages
        pages = self.targets.write(pages, k, v, offset)
        batch = self.batch.offset_pages(offset)
        out = paged_attention(q, pages, batch, num_kv_heads=k.shape[1], scale=scale, sliding_window=sliding_window, backend=self.backend)
        return out, pages
