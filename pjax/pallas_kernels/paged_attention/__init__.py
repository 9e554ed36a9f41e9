"""Paged attention: `api` validates and picks a backend, `reference` is the definition, one file a backend."""

from pjax.pallas_kernels.paged_attention.api import paged_attention
from pjax.pallas_kernels.paged_attention.batch import RaggedBatch
from pjax.pallas_kernels.paged_attention.reference import paged_attention_reference

__all__ = ["RaggedBatch", "paged_attention", "paged_attention_reference"]
