"""The TPU kernels in the interpreter that simulates DMAs, semaphores and uninitialised memory (NaN), against float64.

Pages out of bounds raise there. Compiling for real chips is tests/aot's part.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jax.experimental.pallas import tpu as pltpu

from tests.pallas_kernels.suite import Feature, KernelSuite

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield
    pltpu.reset_tpu_interpret_mode_state()


class TestTpu(KernelSuite):
    backend = "tpu"

    @classmethod
    def takes(cls, feature: Feature) -> bool:
        return feature.dtype != "float16"
