"""The Hopper kernel in Mosaic GPU's interpreter, which simulates TMA copies and barriers, against float64.

wgmma does not run there: plain products stand in. Compiling for real chips is tests/aot's part.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pjax.pallas_kernels import RaggedBatch
from pjax.pallas_kernels.paged_attention import mosaic_gpu
from pjax.pallas_kernels.paged_attention.options import AttentionOptions
from tests.pallas_kernels.paged_attention.suite import FEATURES, Feature, KernelSuite, make_step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter compiles a kernel anew for each warpgroup of each grid step: half a second each. Here once."""
    compiled: dict[int, tuple[Any, Any]] = {}
    lock = threading.Lock()

    def run(jaxpr: Any, consts: Any, *args: Any) -> None:
        with lock:
            if id(jaxpr) not in compiled:
                call = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args))
                compiled[id(jaxpr)] = jaxpr, call.lower(consts, *args).compile()
        compiled[id(jaxpr)][1](consts, *args)

    monkeypatch.setattr(thread_map, "_run_jaxpr", run)
    yield
    interpret_pallas_call.reset_gpu_interpret_mode_state()


class TestMosaicGpu(KernelSuite):
    backend = "mosaic_gpu"
    decode: ClassVar[mosaic_gpu.Sizes] = mosaic_gpu.Sizes(programs=1)
    prefill: ClassVar[mosaic_gpu.Sizes] = mosaic_gpu.Sizes(programs=1, warpgroups=2)
    settings: ClassVar[dict[str, Any]] = {}
    everyday = ("decode-N4_K1_H128-G128", "chunk", "padding")
    features: ClassVar = [feature for feature in FEATURES if feature.dtype != "float32" and feature.heads[1] < 4] + [
        Feature("narrow", (4, 2, 112), 32, "float16", {"scale": 0.2}),
        Feature("padding", (4, 1, 64), 16, "bfloat16"),
        Feature("decode", (4, 4, 64), 16, "float32"),  # refused
    ]

    @classmethod
    def takes(cls, feature: Feature) -> bool:
        return feature.dtype != "float32"

    def attend(self, q: jax.Array, pool: jax.Array, batch: RaggedBatch, **options: Any) -> jax.Array:
        kept = AttentionOptions(**{"scale": q.shape[-1] ** -0.5} | options)
        assert mosaic_gpu.why_not(q, pool, kept, compute_capability="9.0") is None
        interpret = InterpretGPUParams(**self.settings)
        return mosaic_gpu.attend(q, pool, batch, kept, {"decode": self.decode, "prefill": self.prefill}, interpret=interpret)


class TestManySplits(TestMosaicGpu):
    """More splits than short rows have blocks, each block waiting for its one slot, and 64 query rows a tile."""

    decode = prefill = mosaic_gpu.Sizes(slots=1, programs=1000, tokens_per_split=64)
    features: ClassVar = [
        Feature("one", (3, 1, 64), 8, "bfloat16"),
        Feature("decode", (2, 1, 64), 16, "bfloat16", {"sliding_window": 70}),
        Feature("narrow", (1, 1, 80), 64, "float16", {"logit_softcap": 2.0}),
    ]
    everyday = ("one",)


class TestManyHeads(TestMosaicGpu):
    """A decode row's query heads take two warpgroups; blocks of 128 tokens."""

    decode = prefill = mosaic_gpu.Sizes(block=128, programs=1)
    features: ClassVar = [Feature("one", (71, 1, 64), 16, "bfloat16"), Feature("narrow", (80, 1, 128), 64, "bfloat16")]
    everyday = ("one",)


class TestRaces(TestMosaicGpu):
    """Reads and writes of the same memory that no barrier orders, by vector clocks."""

    settings: ClassVar = {"detect_races": True}
    decode = mosaic_gpu.Sizes(slots=2, programs=1)
    prefill = mosaic_gpu.Sizes(slots=2, programs=1, warpgroups=2)
    features: ClassVar = [
        Feature("narrow", (2, 1, 80), 16, "bfloat16"),
        Feature("decode", (1, 1, 64), 64, "bfloat16"),
    ]
    everyday = ("decode",)

    def run(self, feature: Feature) -> None:
        super().run(feature)
        assert not interpret_pallas_call.get_races().races_found


def test_pages_before_the_window_are_not_read() -> None:
    """Their columns of the block table point to a page of NaN."""
    page_size, window = 8, 17
    step = make_step(Feature("decode", (2, 1, 64), page_size, "bfloat16", {"sliding_window": window}))
    columns = np.arange(step.batch.block_tables.shape[1])
    gone = columns[None] < (np.asarray(step.batch.kv_lens)[:, None] - window) // page_size
    tables = jnp.where(jnp.asarray(gone), 0, step.batch.block_tables)
    assert gone.sum() > 20 and np.isnan(step.pool_after[0].astype(np.float32)).all()
    out = mosaic_gpu.attend(
        step.q,
        jnp.asarray(step.pool_after),
        dataclasses.replace(step.batch, block_tables=tables),
        AttentionOptions(num_kv_heads=1, scale=64**-0.5, sliding_window=window),
        {"decode": mosaic_gpu.Sizes(programs=1)},
        interpret=InterpretGPUParams(),
    )
    np.testing.assert_allclose(np.asarray(out, np.float64), step.expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("heads", "page_size", "dtype", "capability", "reason"),
    [
        ((4, 2, 64), 16, "bfloat16", "8.0", "takes GPUs of compute capability 9.x .*is 8.0"),
        ((4, 2, 64), 16, "bfloat16", "10.0", "takes GPUs of compute capability 9.x .*is 10.0"),
        ((4, 2, 64), 16, "bfloat16", None, "takes GPUs of compute capability 9.x .*'cpu'"),
        ((4, 2, 72), 16, "bfloat16", "9.0", "takes head sizes that are multiples of 16 up to 256 .*has 72"),
        ((4, 2, 272), 16, "bfloat16", "9.0", "takes head sizes that are multiples of 16 up to 256 .*has 272"),
        ((4, 2, 64), 4, "bfloat16", "9.0", "takes page sizes .*from 8 on .*have 4"),
        ((4, 2, 64), 24, "bfloat16", "9.0", "takes page sizes that are powers of two .*have 24"),
        ((129, 1, 64), 16, "bfloat16", "9.0", "takes up to 128 query heads to a KV head, but q has 129"),
        ((4, 2, 64), 16, "float32", "9.0", "takes bfloat16 or float16.*float32.*'triton'"),
        ((128, 1, 256), 128, "float16", "9.0", None),
        ((4, 2, 112), 8, "bfloat16", "9.0", None),
    ],
)
def test_why_not(heads: tuple[int, int, int], page_size: int, dtype: str, capability: str | None, reason: str | None) -> None:
    num_heads, num_kv_heads, head_size = heads
    q = jnp.zeros((1, num_heads, head_size), dtype)
    pages = jnp.zeros((1, page_size, 2 * num_kv_heads * head_size), dtype)
    found = mosaic_gpu.why_not(q, pages, AttentionOptions(num_kv_heads=num_kv_heads, scale=1.0), compute_capability=capability)
    if reason is None:
        assert found is None
    else:
        assert found is not None and re.match(reason, found)
