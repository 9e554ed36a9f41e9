"""Sizes of engines on the demo model; those of the same sizes share their compiled steps."""

from __future__ import annotations

from typing import Any

CROWDED: dict[str, Any] = {
    "lazy": True,
    "max_model_len": 320,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "num_pages": 34,
    "progress": False,
}
