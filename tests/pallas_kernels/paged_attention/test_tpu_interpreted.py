"""The TPU kernels in the interpreter that simulates DMAs, semaphores and uninitialised memory (NaN), against float64.

Pages out of bounds raise there. Compiling for real chips is tests/aot's part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pjax.pallas_kernels import RaggedBatch, paged_attention
from pjax.pallas_kernels.paged_attention import tpu
from pjax.pallas_kernels.paged_attention.options import AttentionOptions
from tests.pallas_kernels.paged_attention.suite import CASES, Feature, KernelSuite, make_step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@contextlib.contextmanager
def interpreted(**settings: Any) -> Iterator[None]:
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**settings)):
            yield
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.fixture(autouse=True)
def every_copy_is_waited_for(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """The interpreter only prints when a semaphore is not zero at a kernel's end."""
    yield
    assert "non-zero count" not in capsys.readouterr().out


class TestTpu(KernelSuite):
    backend = "tpu"
    write_backend = "tpu"
    everyday = ("decode-N9_K3_H64", "mixed-N6_K2_H64", "padding", "chunk-N2_K2_H96")

    @classmethod
    def takes(cls, feature: Feature) -> bool:
        return feature.dtype != "float16"

    def run(self, feature: Feature) -> None:
        with interpreted():
            super().run(feature)

    @pytest.mark.parametrize("case", ["decode", pytest.param("mixed", marks=pytest.mark.extended)])
    def test_no_races(self, case: str) -> None:
        """Reads and writes of the same memory that no semaphore orders; found by vector clocks, not by chance."""
        with interpreted(detect_races=True, num_cores_or_threads=2, random_seed=1):
            super().run(Feature(case, (4, 2, 64), 16))
            assert not interpret_pallas_call.races.races_found

    @pytest.mark.parametrize("case", ["decode", pytest.param("mixed", marks=pytest.mark.extended)])
    def test_eager_copies_give_the_same(self, case: str) -> None:
        """By default the interpreter moves data when it is waited for; here when a copy starts, so that late starts show."""
        with interpreted(dma_execution_mode="eager"):
            super().run(Feature(case, (4, 2, 64), 16))


class TestManyBlocks(TestTpu):
    """Blocks of 16 tokens: rows of many blocks, windows that begin inside, tiles of few rows, groups of 8 rows in pages of 24."""

    features: ClassVar = [
        Feature("decode", (4, 2, 64), 16, options={"sliding_window": 70}),
        Feature("mixed", (4, 2, 64), 16, "bfloat16", {"logit_softcap": 2.0}),
        Feature("chunk", (4, 2, 64), 24, "bfloat16"),
    ]
    everyday = ("decode", "chunk")

    def attend(self, q: jax.Array, pool: jax.Array, batch: RaggedBatch, **options: Any) -> jax.Array:
        kept = AttentionOptions(**{"scale": q.shape[-1] ** -0.5} | options)
        return tpu.attend(q, pool, batch, kept, {"decode": tpu.Sizes(block=16), "prefill": tpu.Sizes(block=16, rows=16)})


@pytest.mark.parametrize("window", [33, pytest.param(None, marks=pytest.mark.extended)])
def test_only_live_pages_are_copied(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that leave the pool, by the interpreter's own copies: live pages once a decode row, and once a tile of queries."""
    page_size, num_kv_heads, head_size, tile = 8, 2, 64, 64  # 128 query rows of a tile, two to a token
    row = 2 * num_kv_heads * head_size
    copied: list[int] = []
    execute_read = interpret_pallas_call.DMA.execute_read

    def count(dma: Any) -> None:
        before = dma.data
        execute_read(dma)
        if before is None and dma.data.shape == (page_size, row):
            copied.append(dma.data.size)

    monkeypatch.setattr(interpret_pallas_call.DMA, "execute_read", count)
    rows, _, _ = CASES["mixed"]
    step = make_step(Feature("mixed", (4, num_kv_heads, head_size), page_size))
    with interpreted():
        paged_attention(
            step.q, jnp.asarray(step.pool_after), step.batch, num_kv_heads=num_kv_heads, backend="tpu", sliding_window=window
        ).block_until_ready()
    pages = 0
    for tokens, kv_len in rows:
        for start in range(kv_len - tokens, kv_len, tile):
            first = 0 if window is None else max(0, start - window + 1)
            pages += -(-min(start + tile, kv_len) // page_size) - first // page_size
    assert len(copied) == pages
