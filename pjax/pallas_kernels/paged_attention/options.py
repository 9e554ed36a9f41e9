"""What one call of paged attention computes, beside its arrays: every backend takes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Static and hashable; `api` makes and checks it."""

    num_kv_heads: int  # K
    scale: float  # multiplies the logits
    sliding_window: int | None = None  # tokens that a token sees, itself included
    logit_softcap: float | None = None  # logits become c · tanh(logits / c)
