"""What the suites of the native kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pjax.pallas_kernels import native


def _levels() -> list[str]:
    """Those that this machine has, or PJAX_CPU_LEVEL leaves."""
    level = native.cpu_level()
    return [] if level is None else list(native.CPU_LEVELS[: native.CPU_LEVELS.index(level) + 1])


@pytest.fixture(params=_levels())
def cpu_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with each level of instruction sets, the others hidden from the kernels."""
    before = native.cpu_level()
    native.limit_cpu_level(request.param)
    yield request.param
    native.limit_cpu_level(before)
