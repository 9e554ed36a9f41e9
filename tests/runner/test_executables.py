"""Compiled steps on disk: found again by what they follow from, and by nothing less."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from pjax import LLM, SamplingParams, native
from pjax.layers.norms import RMSNorm
from pjax.models import load
from pjax.runner import executables
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def filled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A folder with the steps of PROMPT, and its tokens."""
    cache = tmp_path_factory.mktemp("steps")
    found = tokens(model, cache)
    assert files(cache)
    return cache, found


@pytest.fixture
def cache(filled: tuple[Path, list[int]], tmp_path: Path) -> Path:
    """The same, for one test."""
    return Path(shutil.copytree(filled[0], tmp_path / "cache"))


@pytest.fixture
def first(filled: tuple[Path, list[int]]) -> list[int]:
    return filled[1]


def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a step was compiled that is on disk")

    monkeypatch.setattr(ModelRunner, "_lower_and_compile", refuse)


def test_a_second_engine_compiles_nothing(model: Path, cache: Path, first: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    no_compiling(monkeypatch)
    assert tokens(model, cache) == first


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


@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_second_process_compiles_nothing(model: Path, tmp_path: Path, num_devices: int) -> None:
    """Not even the page pool's program, which calls a kernel of the native library before anything was traced.

    Where the process has several CPU devices, as trainers make them, a kept program runs on one all the same.
    """
    command = [sys.executable, "-c", COUNTING, str(model), str(tmp_path)]
    env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"}
    done = [subprocess.run(command, check=True, capture_output=True, text=True, env=env) for _ in range(2)]
    first, second = (int(one.stdout) for one in done)
    assert first > 0 and second == 0


def test_the_pool_of_a_step_from_disk_is_updated_in_place(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_compiling(monkeypatch)
    llm = LLM(model, compilation_cache_dir=str(cache), **OPTIONS)
    before = llm.engine.runner._pages
    llm.generate([PROMPT], greedy(2), use_tqdm=False)
    assert before.is_deleted() and llm.engine.runner._pages.unsafe_buffer_pointer()


def test_a_damaged_file_is_compiled_anew(
    model: Path, cache: Path, first: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number, file in enumerate(files(cache)):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1  # one bit, anywhere: the machine code would still be loaded, and executed
        file.write_bytes([b"", content[:100], content][number % 3])
    loaded: list[object] = []
    with monkeypatch.context() as patched:
        patched.setattr(executables.serialize_executable, "deserialize_and_load", lambda *step: loaded.append(step))
        assert tokens(model, cache) == first
    assert not loaded, "a damaged step was executed"
    damaged = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert len(damaged) == len(files(cache)) and all(str(cache) in message for message in damaged)
    no_compiling(monkeypatch)
    assert tokens(model, cache) == first


def test_a_folder_that_is_read_only_is_used_as_it_is(model: Path, cache: Path, first: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read only")

    before = {file: file.read_bytes() for file in files(cache)}
    with monkeypatch.context() as patched:
        patched.setattr(executables.os, "utime", refuse)
        for name in ("write_bytes", "replace", "unlink", "mkdir"):
            patched.setattr(executables.Path, name, refuse)
        with patched.context() as nothing_compiled:
            no_compiling(nothing_compiled)
            assert tokens(model, cache) == first
        assert tokens(model, cache, page_size=8) == first, "what is missing is compiled, and not kept"
    assert {file: file.read_bytes() for file in files(cache)} == before


@pytest.mark.parametrize(
    "change",
    [
        {"page_size": 8},
        {"attention_backend": "xla"},
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.extended),
        pytest.param({"layer_mode": "unroll"}, marks=pytest.mark.extended),
    ],
)
def test_other_settings_are_other_steps(model: Path, cache: Path, change: dict[str, Any]) -> None:
    before = files(cache)
    tokens(model, cache, **change)
    assert set(files(cache)) > set(before)


def test_another_level_of_the_processor_is_other_steps(model: Path, cache: Path, first: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may have been traced for what the processor has."""
    before = files(cache)
    monkeypatch.setattr(native, "cpu_level", lambda: "another")
    assert tokens(model, cache) == first
    assert set(files(cache)) > set(before)


def test_code_counts_by_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another checkout of the same code finds the steps, whenever its files were written; changed code does not."""
    digest, package = executables._code_digest.__wrapped__, Path(executables.__file__).parents[1]
    here = digest()
    clone = tmp_path / "pjax"
    shutil.copytree(package, clone, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    monkeypatch.setattr(executables, "__file__", str(clone / "runner" / "executables.py"))
    assert digest() == here
    (clone / "server" / "app.py").write_text("")
    assert digest() == here, "a step does not follow from the server's code"
    changed = clone / "models" / "layers.py"
    content = changed.read_text()
    changed.write_text(content + "\n")
    assert digest() != here
    changed.write_text(content)
    assert digest() == here
    changed.rename(clone / "models" / "layers2.py")
    assert digest() != here


def test_another_model_of_the_same_shapes_is_another_step(cache: Path, first: list[int], tmp_path: Path) -> None:
    """Its config differs in a number that no shape shows."""
    before = files(cache)
    other = write_model(tmp_path / "other", rope_theta=100.0)
    assert tokens(other, cache) != first
    assert set(files(cache)) > set(before)


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


def test_the_files_used_longest_ago_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are over MAX_BYTES in all; the folder is looked through with an engine's first file and some later ones."""
    monkeypatch.setattr(executables.serialize_executable, "serialize", lambda compiled: compiled)
    monkeypatch.setattr(executables, "MAX_BYTES", 10_000)
    steps = executables.Executables(tmp_path, "engine")
    for number in range(1 + executables.SAVES_PER_LOOK):
        assert steps.get(f"step{number:02}", lambda: b"x" * 1800) == b"x" * 1800
        if number < executables.SAVES_PER_LOOK:
            assert len(list(tmp_path.iterdir())) == number + 1
        for file in tmp_path.glob(f"step{number:02}*"):
            os.utime(file, (number, number))
    kept = sorted(file.name[:6] for file in tmp_path.iterdir())
    assert kept == [f"step{number:02}" for number in range(executables.SAVES_PER_LOOK - 4, executables.SAVES_PER_LOOK + 1)]
