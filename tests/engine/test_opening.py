"""The model that an engine was given."""

from __future__ import annotations

from pathlib import Path

import pytest

from pjax import LLM, SamplingParams, native
from pjax.config import EngineConfig
from pjax.engine.opening import open_source
from pjax.errors import ConfigError
from tests.tiny import write_model


@pytest.mark.parametrize(("platform", "is_built", "warns"), [("cpu", False, True), ("cpu", True, False), ("gpu", False, False)])
def test_an_engine_on_a_cpu_says_that_it_has_no_native_kernels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, platform: str, is_built: bool, warns: bool
) -> None:
    """Whoever has a compiler wants to know; a message that only tracing gives is not seen where steps come from disk."""
    monkeypatch.setattr(native, "cpu_level", lambda: "baseline" if is_built else None)
    open_source(write_model(tmp_path / "tiny"), EngineConfig(), platform, None)[0].close()
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert messages == [f"steps run without native CPU kernels, and more slowly: the library {native.MISSING}"] * warns


def test_a_level_that_the_machine_lacks_is_a_wrong_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ValueError("PJAX_CPU_LEVEL is 'amx', but this machine has 'avx2' at most")

    monkeypatch.setattr(native, "cpu_level", refuse)
    with pytest.raises(ConfigError, match="PJAX_CPU_LEVEL is 'amx'"):
        open_source(tmp_path, EngineConfig(), "cpu", None)


def test_a_length_that_nobody_asked_for_is_what_the_pool_holds(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(folder, lazy=True, progress=False, num_pages=3, page_size=16)
    assert llm.engine.max_model_len == 48
    assert "max_model_len is reduced from 256, the model's own, to 48: the page pool holds no more tokens" in caplog.text
    (output,) = llm.generate(["one two"], SamplingParams(max_tokens=1000, ignore_eos=True), use_tqdm=False)
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 48


def test_a_length_that_was_asked_for_is_refused_where_the_pool_is_too_small(folder: Path) -> None:
    with pytest.raises(ConfigError, match="max_model_len is 100, but the page pool holds 32 tokens: lower max_model_len"):
        LLM(folder, lazy=True, progress=False, max_model_len=100, kv_cache_memory=1 << 13, page_size=16)
