"""The Hopper kernel in Mosaic GPU's interpreter, which simulates TMA copies and barriers, against float64.

wgmma does not run there: plain products stand in. Compiling for real chips is tests/aot's part.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pjax.pallas_kernels import RaggedBatch
from pjax.pallas_kernels.paged_attention import mosaic_gpu
from pjax.pallas_kernels.paged_attention.options import AttentionOptions
from tests.pallas_kernels.suite import Feature, KernelSuite

pytestmark = pytest.mark.timeout(120)


class TestMosaicGpu(KernelSuite):
    backend = "mosaic_gpu"
    settings: ClassVar[dict[str, Any]] = {}
    sizes: ClassVar[mosaic_gpu.MosaicGpuSizes] = mosaic_gpu.MosaicGpuSizes()

    @classmethod
    def takes(cls, feature: Feature) -> bool:
        return feature.dtype != "float32"

    def attend(self, q: jax.Array, pool: jax.Array, batch: RaggedBatch, **options: Any) -> jax.Array:
        kept = AttentionOptions(**{"scale": q.shape[-1] ** -0.5} | options)
        assert mosaic_gpu.why_not(q, pool, kept, compute_capability="9.0") is None
        return mosaic_gpu.attend(q, pool, batch, kept, sizes=self.sizes, interpret=InterpretGPUParams(**self.settings))
