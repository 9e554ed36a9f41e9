"""The Triton kernel in Pallas's interpreter, against float64. Compiling for real chips is tests/aot's part."""

from __future__ import annotations

from typing import Any, ClassVar

import jax

from pjax.pallas_kernels import RaggedBatch
from pjax.pallas_kernels.paged_attention import triton
from pjax.pallas_kernels.paged_attention.options import AttentionOptions
from tests.pallas_kernels.paged_attention.suite import Feature, KernelSuite


class TestTriton(KernelSuite):
    backend = "triton"
    sizes: ClassVar[dict[str, triton.Sizes]] = {}
    everyday = ("decode-N9_K3_H64", "mixed-N4_K2_H80", "padding", "chunk-N2_K2_H96")

    def attend(self, q: jax.Array, pool: jax.Array, batch: RaggedBatch, **options: Any) -> jax.Array:
        kept = AttentionOptions(**{"scale": q.shape[-1] ** -0.5} | options)
        assert triton.why_not(q, pool, kept) is None
        return triton.attend(q, pool, batch, kept, self.sizes, interpret=True)


class TestManySplits(TestTriton):
    """Small blocks and more splits than a row has blocks: short rows leave splits empty."""

    sizes: ClassVar = {
        "decode": triton.Sizes(rows=16, tokens=16, warps=4, stages=2, programs=200, tokens_per_split=16),
        "prefill": triton.Sizes(rows=16, tokens=16, warps=4, stages=2, programs=400, tokens_per_split=32),
    }
    features: ClassVar = [
        Feature("decode", (9, 3, 64), 16),
        Feature("mixed", (4, 2, 80), 8, options={"sliding_window": 33, "logit_softcap": 2.0}),
        Feature("chunk", (4, 2, 64), 64, "bfloat16"),
    ]
    everyday = ("decode", "chunk")
