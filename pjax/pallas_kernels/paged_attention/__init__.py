"""Paged attention: `api` validates and picks a backend, `reference` is the definition, one file a backend."""

from pjax.pallas_kernels.paged_attention.api import paged_attention
from pjax.pallas_kernels.paged_attention.ragged_batch import RaggedBatch

__all__ = ["RaggedBatch", "paged_attention"]
