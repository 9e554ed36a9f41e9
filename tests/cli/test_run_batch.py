"""run-batch loses nothing: no file of somebody else, no answer that was written, no request because of another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pjax import LLM, AsyncLLM, SamplingParams, cli
from pjax.cli import run_batch
from pjax.cli.run_batch import Answers, read_answers, read_requests
from tests.cli.common import ENGINE

CUT = '{"id": "batch_req_0123", "custom_id": "b", "resp'


class Batch:
    """The command with two files in a folder."""

    def __init__(self, folder: Path, model: Path | str, capsys: pytest.CaptureFixture[str]) -> None:
        self.source, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self._model, self._capsys = str(model), capsys

    def run(self, *more: str, output: Path | None = None) -> tuple[int, str]:
        """The status and the last line of standard error."""
        files = ("-i", str(self.source), "-o", str(output or self.output))
        status = cli.main(["run-batch", *files, "--model", self._model, "--served-model-name", "m", *ENGINE, *more])
        return status, self._capsys.readouterr().err.splitlines()[-1]

    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]


@pytest.fixture
def batch(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> Batch:
    return Batch(tmp_path, model, capsys)


@pytest.fixture
def unloaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Batch:
    """With a model that cannot be loaded: what it tells, it tells before."""
    return Batch(tmp_path, "/nowhere", capsys)


def as_jsonl(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def request(name: str, prompt: str = "abc", **body: Any) -> dict[str, Any]:
    body = {"model": "m", "prompt": prompt, "max_tokens": 4, "temperature": 0} | body
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}


def answered(name: str) -> dict[str, Any]:
    response = {"status_code": 200, "request_id": "", "body": "from before"}
    return {"id": "batch_req_1", "custom_id": name, "response": response, "error": None}


def failed(name: str) -> dict[str, Any]:
    response = {"status_code": 400, "request_id": "", "body": {}}
    return {"id": "batch_req_2", "custom_id": name, "response": response, "error": {"message": "x", "code": None}}


def test_a_batch_goes_on_where_it_was_interrupted(batch: Batch, llm: LLM) -> None:
    chat = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "hi"}]}}
    chat["body"] |= {"max_tokens": 4, "temperature": 0}
    batch.source.write_text(as_jsonl(request("a"), request("b", "bcd"), chat, request("bad", top_p=7)))
    batch.output.write_text(as_jsonl(answered("a")) + CUT)
    assert batch.run() == (1, "2 requests answered, 1 failed, 1 were there already")
    found = {record["custom_id"]: record for record in batch.answers()}
    assert next(iter(found)) == "a" and found["a"] == answered("a")
    params = SamplingParams(temperature=0, max_tokens=4)
    expected = llm.generate(["bcd"], params, use_tqdm=False)[0].outputs[0].text
    assert found["b"]["response"]["body"]["choices"][0]["text"] == expected
    assert found["c"]["response"]["status_code"] == 200
    assert found["bad"]["response"]["status_code"] == 400
    assert "top_p" in found["bad"]["error"]["message"]
    before = batch.output.read_text()
    assert batch.run("--keep-errors") == (1, f"1 of 4 requests failed before in {batch.output}")
    assert batch.output.read_text() == before


def test_what_failed_is_asked_again_and_has_one_line_in_the_end(batch: Batch) -> None:
    batch.source.write_text(as_jsonl(request("a"), request("b"), request("c", top_p=7)))
    batch.output.write_text(as_jsonl(failed("c"), answered("a"), failed("b")) + CUT)
    assert read_answers(batch.output) == Answers({"a"}, {"b", "c"}, len(as_jsonl(failed("c"), answered("a"), failed("b"))))
    for _ in range(2):
        assert batch.run()[0] == 1
        found = sorted((record["custom_id"], record["error"] is None) for record in batch.answers())
        assert found == [("a", True), ("b", True), ("c", False)]
    batch.source.write_text(as_jsonl(request("a"), request("b"), request("c")))
    assert batch.run() == (0, "1 requests answered, 0 failed, 2 were there already")
    assert batch.run() == (0, f"all 3 requests have their answers in {batch.output}")
    assert sorted(path.name for path in batch.output.parent.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    "content",
    [
        '{"name": "a file in one line"}',
        "notes\nof mine, without a last line break",
        "notes\n",
        as_jsonl(answered("a")) + "and something else",
        as_jsonl({"custom_id": "a", "body": {}}),
        as_jsonl(answered("a")) + "[1]\n",
        "\x00" * 1000,
    ],
)
def test_a_file_that_is_not_ours_is_refused_and_not_touched(unloaded: Batch, content: str) -> None:
    unloaded.source.write_text(as_jsonl(request("a"), request("b")))
    unloaded.output.write_text(content)
    status, told = unloaded.run()
    assert status == 2 and f"--output {unloaded.output}" in told and "no answer of a batch" in told
    assert unloaded.output.read_text() == content


def test_the_input_a_device_or_a_folder_is_no_output(unloaded: Batch, tmp_path: Path) -> None:
    unloaded.source.write_text(as_jsonl(request("a")))
    link = tmp_path / "link.jsonl"
    link.symlink_to(unloaded.source)
    for output, told in (
        (unloaded.source, "is the input"),
        (link, "is the input"),
        (Path("/dev/full"), "is no regular file"),
        (Path("/dev/zero"), "is no regular file"),
        (tmp_path, "is no regular file"),
    ):
        status, message = unloaded.run(output=output)
        assert status == 2 and told in message
    assert unloaded.run(output=tmp_path / "missing" / "out.jsonl")[0] == 1
    assert unloaded.source.read_text() == as_jsonl(request("a"))


def test_a_device_without_line_breaks_is_not_read_for_ever(unloaded: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_batch, "MAX_LINE", 1000)
    unloaded.source = Path("/dev/zero")
    status, told = unloaded.run()
    assert status == 2 and "has a line of more than 1000 bytes" in told


ODD = [
    ("{", "no JSON"),
    ("\ufeff[" * 3, "no JSON"),
    ("[" * 100_000, "no JSON"),
    ("[]", "must be an object with a custom_id"),
    ('{"body": {}}', "must be an object with a custom_id"),
    (json.dumps(request("a")), "custom_id 'a' is there twice"),
    (json.dumps(request("b") | {"url": "/v1/embeddings"}), "POST /v1/embeddings, but must be POST to one of"),
    (json.dumps(request("b", stream=True)), "a batch has no streams"),
]


def test_an_odd_line_gets_an_error_with_its_number_and_the_others_are_answered(batch: Batch) -> None:
    nested = "[" * 900 + "]" * 900
    odd = [line for line, _ in ODD] + [
        json.dumps(request("nan", temperature=float("nan"))),
        json.dumps(request("surrogate", "\ud800")),
        json.dumps(request("\udfff")),
        json.dumps(request("nested")).replace('"abc"', nested),
    ]
    batch.source.write_bytes((as_jsonl(request("a")) + "\n".join([*odd, ""])).encode() + b"\xff\n" + as_jsonl(request("z")).encode())
    for _ in range(2):  # and the same when it is run again
        status, told = batch.run()
        assert status == 1 and told.split(", ")[1] == "12 failed"
        found = batch.answers()
        assert {record["custom_id"] for record in found if record["error"] is None} == {"a", "z", "\udfff"}
        lines = {record["error"].get("line"): record["error"]["message"] for record in found if record["error"] is not None}
        for number, (_, message) in enumerate(ODD, 2):
            assert f"in.jsonl:{number}: " in lines[number] and message in lines[number]
        assert "no JSON" in lines[len(odd) + 2]
        assert len(found) == len(odd) + 3
        for name, param in (("nan", "temperature"), ("surrogate", "prompt"), ("nested", "prompt")):
            [error] = [record["error"] for record in found if record["custom_id"] == name]
            assert error["param"] == param


def test_odd_lines_alone_need_no_model(unloaded: Batch) -> None:
    unloaded.source.write_text("{\n")
    assert unloaded.run() == (1, "0 requests answered, 1 failed, 0 were there already")
    assert unloaded.answers()[0]["error"]["line"] == 1
    assert unloaded.run("--keep-errors")[0] == 1
    assert len(unloaded.answers()) == 1


def test_what_a_dead_engine_says_is_no_answer(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[AsyncLLM] = []
    prepare = AsyncLLM._prepare

    async def dying(self: AsyncLLM, *arguments: Any) -> Any:
        made.append(self)
        if len(made) == 3:
            self._die(RuntimeError("the device is lost"))
        return await prepare(self, *arguments)

    batch.source.write_text(as_jsonl(*(request(f"{index}") for index in range(20))))
    with monkeypatch.context() as patch:
        patch.setattr(AsyncLLM, "_prepare", dying)
        status, told = batch.run()
    assert status == 1 and "the engine died: RuntimeError: the device is lost" in told and "requests have no answer yet" in told
    assert all(record["error"] is None for record in batch.answers())
    assert batch.run()[0] == 0
    assert sorted(record["custom_id"] for record in batch.answers()) == sorted(f"{index}" for index in range(20))


def test_a_disk_that_is_full_is_told_in_a_line(batch: Batch, model: Path) -> None:
    batch.source.write_text(as_jsonl(request("a"), request("b")))
    files = ["-i", str(batch.source), "-o", str(batch.output)]
    arguments = ["run-batch", *files, "--model", str(model), *ENGINE, "--compilation-cache-dir", "none"]
    code = f"""
import resource
from pjax import cli
import signal
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cli.entry({arguments!r})
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=os.environ, check=False)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith("pjax run-batch: [Errno 27]") and "Traceback" not in found.stderr


def test_output_that_cannot_be_written_is_told_in_a_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "pjax", "collect-env"]
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert (found.returncode, found.stderr) == (1, "pjax collect-env: [Errno 28] No space left on device\n")


def test_places_that_cannot_be_written_are_told_before_the_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "x")
    for command in (["generate", "a", "--profile", nowhere], ["bench", "latency", "--json", nowhere]):
        assert cli.main([*command, "--model", "/no/such/model"]) == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "Not a directory" in told


def test_lines_are_read_whatever_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(request("a")).encode() + b"\r\n\r\n" + json.dumps(request("b")).encode())
    assert [(item.number, item.custom_id, item.problem) for item in read_requests(path)] == [(1, "a", None), (3, "b", None)]
