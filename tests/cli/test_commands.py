"""The commands as programs, on the made-up model: conversations, continuations, batches and measurements, here and at a server."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pjax import LLM, AsyncLLM, SamplingParams, cli
from pjax.cli.chat import Chat
from tests.cli.common import ENGINE
from tests.server.common import OPTIONS, Running, start
from tests.tiny import write_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Running]:
    with start(AsyncLLM(model, **OPTIONS, max_waiting=100), model, api_keys="sesame") as running:
        yield running


@pytest.fixture
def pjax(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        status = cli.main(arguments)
        return status, *capsys.readouterr()

    return run


def test_complete_and_chat_say_the_same_here_and_at_a_server(
    pjax: Run, model: Path, llm: LLM, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PJAX_API_KEY", "sesame")
    params = SamplingParams(temperature=0, max_tokens=8)
    text = llm.generate(["abc"], params, use_tqdm=False)[0].outputs[0].text
    first = llm.chat([{"role": "user", "content": "hi"}], params, use_tqdm=False)[0].outputs[0].text
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first}, {"role": "user", "content": "and?\nso"}]
    second = llm.chat(turns, params, use_tqdm=False)[0].outputs[0].text
    for where in (["--model", str(model), *ENGINE], ["--url", server.url]):
        assert pjax("complete", "abc", "--max-tokens", "8", *where)[:2] == (0, f"abc{text}\n")
        assert pjax("complete", "--max-tokens", "8", *where, stdin="abc\n\nabc\n")[:2] == (0, f"abc{text}\n" * 2)
        asked = pjax("chat", "--max-tokens", "8", *where, stdin="hi\nand?\\\nso\n/exit\nnever asked\n")
        assert asked[:2] == (0, f"{first}\n{second}\n")


def test_a_text_that_cannot_be_continued_is_told(pjax: Run, tmp_path: Path, llm: LLM) -> None:
    """The letter x has an infinite embedding: what reads it has NaN for logits."""
    tensors = load_file(write_model(tmp_path) / "model.safetensors")
    [letter] = llm.get_tokenizer().encode("x")
    tensors["model.embed_tokens.weight"][letter] = np.inf
    save_file(tensors, tmp_path / "model.safetensors")
    options = ["--model", str(tmp_path), "--max-tokens", "3", "--ignore-eos", *ENGINE]
    text = llm.generate(["abc"], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True), use_tqdm=False)[0].outputs[0].text
    status, out, _ = pjax("generate", "x", "abc", "--json", *options)
    bad, good = map(json.loads, out.splitlines())
    assert (status, bad["finish_reason"], bad["text"], good["text"]) == (1, "error", "", text)
    assert bad["stop_reason"].startswith("no token 1 could be sampled")
    status, out, err = pjax("complete", "x", *options)
    assert (status, out) == (2, "x") and "pjax complete: no token 1 could be sampled" in err
    status, out, err = pjax("complete", *options, stdin="x\nabc\n")
    assert (status, out) == (0, f"xabc{text}\n") and "pjax complete: no token 1 could be sampled" in err


def test_a_server_that_refuses_or_is_not_there_is_told_in_a_line(pjax: Run, server: Running) -> None:
    status, out, err = pjax("complete", "abc", "--url", server.url, "--api-key", "wrong")
    assert (status, out, err) == (2, "", "pjax complete: 401: the API key is wrong\n")
    status, out, err = pjax("chat", "--url", "http://127.0.0.1:1")
    assert (status, out) == (2, "")
    assert err.startswith("pjax chat: http://127.0.0.1:1/v1/ does not answer")


class Echo:
    """Answers with the last message, in capitals, letter by letter."""

    name = "echo"

    def __init__(self) -> None:
        self.asked: list[list[dict[str, str]]] = []
        self.stop_after: int | None = None

    def complete(self, prompt: str) -> Iterator[str]:
        yield prompt

    def chat(self, messages: Any) -> Iterator[str]:
        self.asked.append([dict(message) for message in messages])
        for index, letter in enumerate(messages[-1]["content"].upper()):
            if index == self.stop_after:
                raise KeyboardInterrupt
            yield letter

    def close(self) -> None:
        pass


def test_commands_of_a_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    echo = Echo()
    chat = Chat(echo, "be loud")
    for line in ("hi", "/retry", "//what", "/undo", f"/save {tmp_path / 'a.json'}", "/nonsense", "/system"):
        assert chat.take(line)
    assert echo.asked[1] == echo.asked[0] == [{"role": "system", "content": "be loud"}, {"role": "user", "content": "hi"}]
    assert echo.asked[2][-1]["content"] == "/what"
    assert chat.messages == []
    assert "/nonsense is no command" in capsys.readouterr().err
    assert chat.take(f"/load {tmp_path / 'a.json'}")
    assert [message["content"] for message in chat.messages] == ["be loud", "hi", "HI"]
    echo.stop_after = 2
    assert chat.take("stopped")
    assert chat.messages[-1] == {"role": "assistant", "content": "ST"}
    assert chat.take("/load /nowhere")
    assert "is no conversation" in capsys.readouterr().err
    assert not chat.take("/exit")


def test_measurements_count_what_ran(pjax: Run, model: Path, server: Running, tmp_path: Path) -> None:
    small = ["--input-len", "20", "--output-len", "6", "--json", str(tmp_path / "f.json")]
    here = ["--model", str(model), *ENGINE]

    def figures(*arguments: str) -> dict[str, Any]:
        status, out, err = pjax("bench", *arguments, *small)
        assert status == 0, err
        found = json.loads((tmp_path / "f.json").read_text())
        assert all(name in out for name in found if not name.endswith("runs_s"))
        return found

    found = figures("latency", "--batch-size", "2", "--num-iters", "3", "--breakdown", *here)
    assert len(found["runs_s"]) == 3 and found["breakdown"]["decode_2"]["steps"] == 4  # the prompts take two
    assert found["latency_s"]["max"] == max(found["runs_s"])
    found = figures("throughput", "--num-prompts", "6", "--range-ratio", "0.5", *here)
    assert found["requests"] == 6
    assert 6 * 3 <= found["output_tokens"] <= 6 * 9
    at = ["--url", server.url, "--api-key", "sesame", "--vocab-size", "256"]
    found = figures("serve", "--num-prompts", "6", "--request-rate", "50", "--max-concurrency", "2", *at)
    assert (found["requests"], found["failed"], found["input_tokens"], found["output_tokens"]) == (6, 0, 120, 36)
    assert found["first_token_s"]["max"] <= found["end_to_end_s"]["max"]


def test_a_failed_request_of_a_measurement_is_counted(pjax: Run, server: Running) -> None:
    at = ("--url", server.url, "--api-key", "sesame", "--vocab-size", "256", "--num-prompts", "2")
    status, out, err = pjax("bench", "serve", *at, "--input-len", "1000")
    assert status == 1
    assert "failed                 2" in out
    assert "2 times: 400" in err
    assert "--num-prompts is 0, but must be >= 1" in pjax("bench", "serve", "--num-prompts", "0")[2]
