"""The short form of `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import Soak
from tests.tiny import write_model


@pytest.mark.extended
def test_a_few_hundred_random_requests_end_as_they_should(tmp_path: Path) -> None:
    soak = Soak(write_model(tmp_path), seed=3)
    figures = soak.run(300)
    soak.engine.close()
    assert set(figures.reasons) == {"stop", "length", "abort", "timeout"}, figures
    assert figures.num_compared > 30 and figures.num_preemptions > 30 and figures.num_cached_tokens > 200, figures
