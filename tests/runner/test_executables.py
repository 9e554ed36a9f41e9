"""Compiled steps on disk: found again by what they follow from, and by nothing less."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pjax import LLM, SamplingParams
from pjax.models import load
from pjax.models.layers import RMSNorm
from pjax.runner.executables import MAX_KEPT, Executables
from pjax.runner.runner import ModelRunner
from tests.engine.common import OPTIONS, greedy
from tests.tiny import write_model

PROMPT = [1, 2, 3, 4, 5]


def tokens(folder: Path, cache: Path, **options: Any) -> list[int]:
    llm = LLM(folder, compilation_cache_dir=str(cache), **OPTIONS | options)
    (output,) = llm.generate([PROMPT], greedy(8), use_tqdm=False)
    return list(output.outputs[0].token_ids)


def files(cache: Path) -> list[Path]:
    return sorted((cache / "steps").iterdir()) if (cache / "steps").exists() else []


@pytest.fixture(autouse=True)
def _no_cache_of_jax() -> Iterator[None]:
    """Which an engine of an earlier test, or of one here, has turned on for the whole process."""
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()  # it goes on in the folder that it began with
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a step was compiled that is on disk")

    monkeypatch.setattr(ModelRunner, "_lower_and_compile", refuse)


def test_a_second_engine_compiles_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokens(model, tmp_path)
    assert files(tmp_path)
    no_compiling(monkeypatch)
    assert tokens(model, tmp_path) == first


COUNTING = """
import sys
import jax, jax.monitoring
from pjax import LLM, SamplingParams
compiled = []
def listen(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(event)
jax.monitoring.register_event_duration_secs_listener(listen)
llm = LLM(sys.argv[1], compilation_cache_dir=sys.argv[2], lazy=True, max_model_len=96, num_pages=16, progress=False)
llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
print(len(compiled))
"""


def test_a_second_process_compiles_nothing(model: Path, tmp_path: Path) -> None:
    """Not even the page pool's program, which calls a kernel of the native library before anything was traced."""
    command = [sys.executable, "-c", COUNTING, str(model), str(tmp_path)]
    first, second = (int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(2))
    assert first > 0 and second == 0


def test_the_pool_of_a_step_from_disk_is_updated_in_place(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens(model, tmp_path)
    no_compiling(monkeypatch)
    llm = LLM(model, compilation_cache_dir=str(tmp_path), **OPTIONS)
    before = llm.engine.runner._pages
    llm.generate([PROMPT], greedy(2), use_tqdm=False)
    assert before.is_deleted() and llm.engine.runner._pages.unsafe_buffer_pointer()


def test_a_damaged_file_is_compiled_anew(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokens(model, tmp_path)
    for number, file in enumerate(files(tmp_path)):
        file.write_bytes(b"" if number == 0 else file.read_bytes()[:100])
    assert tokens(model, tmp_path) == first
    no_compiling(monkeypatch)
    assert tokens(model, tmp_path) == first


@pytest.mark.parametrize("change", [{"page_size": 8}, {"dtype": "bfloat16"}, {"layer_mode": "unroll"}, {"attention_backend": "xla"}])
def test_other_settings_are_other_steps(model: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    tokens(model, tmp_path)
    before = files(tmp_path)
    tokens(model, tmp_path, **change)
    assert set(files(tmp_path)) > set(before)


def test_another_model_of_the_same_shapes_is_another_step(model: Path, tmp_path: Path) -> None:
    """Its config differs in a number that no shape shows."""
    first, before = tokens(model, tmp_path), files(tmp_path)
    other = write_model(tmp_path / "other", rope_theta=100.0)
    assert tokens(other, tmp_path) != first
    assert set(files(tmp_path)) > set(before)


def test_steps_with_code_of_the_callers_are_not_kept(model: Path, tmp_path: Path) -> None:
    llm = LLM(model, compilation_cache_dir=str(tmp_path), logits_processors={"same": lambda logits, tokens, lengths: logits}, **OPTIONS)
    llm.generate([PROMPT], SamplingParams(max_tokens=2), use_tqdm=False)
    assert not files(tmp_path)


class Mine(RMSNorm):
    """A caller's, somewhere in a model of pjax."""


def test_models_with_a_callers_module_inside_are_not_kept(model: Path, tmp_path: Path) -> None:
    for kind, is_kept in ((RMSNorm, True), (Mine, False)):
        loaded = load(str(model))
        loaded.norm = kind(loaded.config.hidden_size, epsilon=loaded.config.rms_norm_epsilon, dtype=jnp.float32)
        cache = tmp_path / kind.__name__
        llm = LLM(loaded, compilation_cache_dir=str(cache), skip_tokenizer_init=True, **OPTIONS)
        llm.generate([{"prompt_token_ids": PROMPT}], greedy(2), use_tqdm=False)
        assert bool(files(cache)) == is_kept


def test_the_oldest_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pjax.runner.executables.serialize_executable.serialize", lambda compiled: compiled)
    for number in range(MAX_KEPT + 3):
        assert Executables(tmp_path, number).get("step", lambda: "compiled") == "compiled"
    assert len(list(tmp_path.iterdir())) == MAX_KEPT
