"""Paged attention over a preallocated page pool. Imports jax only, and is usable without the rest of pjax (docs/kernels.md)."""

from pjax.pallas_kernels.kv_write import write_targets
from pjax.pallas_kernels.paged_attention import RaggedBatch, paged_attention
from pjax.pallas_kernels.pages import page_bytes, pool_format, pool_shape, read_kv, write_kv

__all__ = ["RaggedBatch", "page_bytes", "paged_attention", "pool_format", "pool_shape", "read_kv", "write_kv", "write_targets"]
