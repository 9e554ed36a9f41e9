"""scripts/generate.py as a program, on a made-up model: where prompts come from, what is printed, how errors read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import write_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


def generate(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONUTF8": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), *arguments]
    return subprocess.run(command, input=stdin or "", capture_output=True, encoding="utf-8", timeout=200, env=environment, check=False)


@pytest.mark.slow
def test_prompts_from_arguments_file_and_standard_input(model: Path, tmp_path: Path) -> None:
    common = ("--model", str(model), "--max-tokens", "6", "--ignore-eos")
    (tmp_path / "prompts.txt").write_text("two\n\nthree\n")
    result = generate("one", "--file", str(tmp_path / "prompts.txt"), "--json", "--stats", *common)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["prompt"] for record in records] == ["one", "two", "three"]
    assert all(len(record["token_ids"]) == 6 and record["finish_reason"] == "length" for record in records)
    assert [record["num_prompt_tokens"] for record in records] == [3, 3, 5]
    assert "prompts          3 (11 tokens in, 0 of them cached, 18 out)" in result.stderr
    assert "first token" in result.stderr
    piped = generate(*common, stdin="one\n")
    assert piped.stdout == records[0]["text"] + "\n"
    assert piped.stderr == ""


def test_times_count_from_the_process_start() -> None:
    code = "import time; time.sleep(0.3); from pjax.cli.generate import process_age; print(process_age())"
    before = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT).stdout)
    assert 0.29 <= age <= time.monotonic() - before + 0.02


@pytest.mark.slow
def test_a_chat_template_of_ones_own(model: Path, tmp_path: Path) -> None:
    """Every byte is a token of this model, so the prompt's length is that of the rendered text."""
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    common = ("--model", str(model), "--max-tokens", "2", "--json", "--chat", "--system", "sys", "--profile", str(tmp_path / "trace"))
    result = generate("hi", "--chat-template", str(template), *common)
    assert list((tmp_path / "trace").rglob("*.xplane.pb")), "--profile wrote nothing"
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["num_prompt_tokens"] == len("[system]sys[user]hi")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no prompt"),
        (("a", "--top-p", "2", "--temperature", "1"), "top_p is 2.0, but must be in (0, 1]"),
        (("a", "--top-p", "0.5", "--seed", "1"), "--top-p, --seed: no use at --temperature 0"),
        (("a", "--system", "b"), "--system: no use without --chat"),
        (("a", "--chat-template", "b"), "--chat-template: no use without --chat"),
        (("a", "--chat", "--chat-template", "/nowhere.jinja"), "chat template /nowhere.jinja is not readable as a file of UTF-8"),
        (("a", "--chat", "--chat-template", "{model}/model.safetensors"), "model.safetensors is not readable as a file of UTF-8"),
        (("a", "--max-num-seqs", "0"), "max_num_seqs is 0"),
        (("a", "--max-tokens", "0"), "max_tokens is 0"),
        (("a", "--model", "/nowhere"), "/nowhere does not exist"),
        (("a", "--kv-cache-memory", "lots"), "'lots' is no size such as 500M or 2G"),
        (("--file", "/nowhere.txt"), "/nowhere.txt"),
    ],
    ids=str,
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str, model: Path, tmp_path: Path) -> None:
    arguments = tuple(argument.replace("{model}", str(model)) for argument in arguments)
    if "--model" not in arguments:
        arguments = (*arguments, "--model", str(model))
    result = generate(*arguments)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.extended
def test_tensor_parallel(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text from two devices; more than there are is refused."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    prompt = "one two " * 10  # more tokens than a step has that goes without large pages
    common = (prompt, "--model", str(model), "--max-tokens", "6", "--ignore-eos", "--tensor-parallel-size")
    one, two, three = (generate(*common, size) for size in "123")
    assert two.returncode == 0, two.stderr
    assert two.stdout == one.stdout and two.stdout.strip()
    assert three.returncode == 2 and "tensor_parallel_size is 3, but there are 2 devices (cpu)" in three.stderr
