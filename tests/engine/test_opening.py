"""The model that an engine was given."""

from __future__ import annotations

from pathlib import Path

import pytest

from pjax.config import EngineConfig
from pjax.engine.opening import open_source
from pjax.pallas_kernels import native
from tests.tiny import write_model


@pytest.mark.parametrize(("platform", "is_built", "warns"), [("cpu", False, True), ("cpu", True, False), ("gpu", False, False)])
def test_an_engine_on_a_cpu_says_that_it_has_no_native_kernels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, platform: str, is_built: bool, warns: bool
) -> None:
    """Whoever has a compiler wants to know; a message that only tracing gives is not seen where steps come from disk."""
    monkeypatch.setattr(native, "library", lambda: object() if is_built else None)
    open_source(write_model(tmp_path / "tiny"), EngineConfig(), platform, None)[0].close()
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert messages == [f"steps run without native CPU kernels, and more slowly: the library {native.MISSING}"] * warns
