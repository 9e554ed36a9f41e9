"""Paged attention over a preallocated page pool. Imports jax only, and is usable without the rest of pjax."""

from pjax.pallas_kernels.paged_attention import RaggedBatch, paged_attention, paged_attention_reference

__all__ = ["RaggedBatch", "paged_attention", "paged_attention_reference"]
