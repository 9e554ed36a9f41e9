"""From start to end: SIGTERM lets requests end, for so long; a dead engine ends the server and says why."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pjax import LLM, AsyncLLM, ConfigError, EngineDeadError, SamplingParams, cli
from pjax.server import ServerConfig, lifecycle, run
from pjax.server.lifecycle import bind, serve_llm
from tests.server.common import OPTIONS, ScriptedLLM, metrics, start, wait_for

ROOT = Path(__file__).resolve().parents[2]
PATH = "/v1/completions"
OBSERVED = ("/health", "/ready", "/metrics")
SCRIPT = """
import sys, time
from pjax.config import EngineConfig
from pjax.engine import LLMEngine
from pjax.runner import ModelRunner
from pjax.server import ServerConfig, run

def fail_after(count, cls, name, fail):
    call, num_calls = getattr(cls, name), 0
    def failing(*arguments):
        nonlocal num_calls
        num_calls += 1
        return call(*arguments) if num_calls <= count else fail()
    setattr(cls, name, failing)

def lose_the_device():
    raise RuntimeError("the device is lost")

{failure}
options = {options}
options.pop("progress")
sys.exit(run(ServerConfig(model={model!r}, port={port}, log_level="warning", engine=EngineConfig(**options), **{settings})))
"""
DYING = 'fail_after(5, LLMEngine, "step", lose_the_device)'
NUM_FETCHED = 5
HANGING = f'fail_after({NUM_FETCHED}, ModelRunner, "fetch", lambda: time.sleep(3600))'
COMPILING = 'fail_after(0, ModelRunner, "_compile", lambda: time.sleep(3600))'


def free_port() -> int:
    with bind("127.0.0.1", 0) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def process(folder: Path, failure: str = "", **settings: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, once it is ready."""
    port = free_port()
    code = SCRIPT.format(failure=failure, options=OPTIONS, model=str(folder), port=port, settings=settings)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True) as server:
        url = f"http://127.0.0.1:{port}"

        def is_ready() -> bool:
            assert server.poll() is None, server.stderr and server.stderr.read()
            try:
                return httpx2.get(f"{url}/ready").status_code == 200
            except httpx2.TransportError:
                return False

        try:
            wait_for(is_ready, 120)
            yield server, url
        finally:
            server.kill()


@contextmanager
def serving(llm: Any, **settings: Any) -> Iterator[tuple[str, list[int]]]:
    """A server in a thread, which must have ended when the block has; its address, and its status in the end."""
    statuses: list[int] = []
    listener = bind("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: statuses.append(serve_llm(llm, ServerConfig(model="tiny", **settings), listener)))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread.start()
    wait_for(lambda: health(url) == 200)
    yield url, statuses
    thread.join(60)
    assert not thread.is_alive()


def health(url: str) -> int:
    """/health's status; 0 when nobody listens any more."""
    try:
        return httpx2.get(f"{url}/health").status_code
    except httpx2.TransportError:
        return 0


def test_sigterm_under_load_loses_no_request(folder: Path, llm: LLM) -> None:
    prompts = ["abc", "San Francisco is a", "x" * 40]
    params = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
    expected = [output.outputs[0].text for output in llm.generate(prompts, SamplingParams(**params), use_tqdm=False)]

    async def stream(client: httpx2.AsyncClient, index: int, begun: list[int]) -> str:
        text = ""
        async with client.stream("POST", PATH, json={"prompt": prompts[index % 3], "stream": True, **params}) as response:
            assert response.status_code == 200
            begun.append(index)
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        assert line.startswith("data: [DONE]") or not line
        return text

    async def main(server: subprocess.Popen[str], url: str) -> list[str]:
        begun: list[int] = []
        async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
            tasks = [asyncio.create_task(stream(client, index, begun)) for index in range(8)]
            while len(begun) < 8:
                await asyncio.sleep(0.01)
            server.send_signal(signal.SIGTERM)
            return await asyncio.gather(*tasks)

    with process(folder) as (server, url):
        texts = asyncio.run(main(server, url))
        assert server.wait(60) == 0
        assert server.stderr is not None and "Traceback" not in server.stderr.read()
    assert texts == [expected[index % 3] for index in range(8)]


def test_a_dead_engine_ends_the_process_and_its_last_line_says_why(folder: Path) -> None:
    with process(folder, DYING) as (server, url):
        # A step is tried again; then its request is given up; the third failure in a row is the engine's end.
        body = {"prompt": "abc", "max_tokens": 60, "ignore_eos": True}
        answers = [httpx2.post(url + PATH, json=body, timeout=120) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [500, 503]
        assert not any("device" in answer.text for answer in answers)
        assert server.wait(60) == 1
        assert server.stderr is not None
        assert server.stderr.read().splitlines()[-1] == "pjax: the engine died: RuntimeError: the device is lost"


def test_a_hung_device_ends_the_process(folder: Path, llm: LLM) -> None:
    """A stream gets all tokens that there are, then an error."""
    params = SamplingParams(temperature=0, max_tokens=NUM_FETCHED, ignore_eos=True)
    expected = llm.generate("abc", params, use_tqdm=False)[0].outputs[0].token_ids
    with process(folder, HANGING, step_timeout=3) as (server, url):
        body = {"prompt": "abc", "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True}
        with httpx2.stream("POST", url + PATH, json=body, timeout=60) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        assert response.status_code == 200 and lines[-1] == "data: [DONE]"
        assert [token for line in lines[:-2] for token in json.loads(line[6:])["choices"][0]["token_ids"]] == expected
        assert json.loads(lines[-2][6:])["error"]["code"] == "service_unavailable"
        assert health(url) in (503, 0)
        assert server.wait(60) == 1
        assert server.stderr is not None
        last = "pjax: the engine died: EngineDeadError: a step has not ended within step_timeout, 3 seconds"
        assert server.stderr.read().splitlines()[-1] == last


def test_sigterm_waits_for_no_compilation(folder: Path) -> None:
    statuses: list[int] = []
    with process(folder, COMPILING, drain_seconds=0.5) as (server, url):

        def ask() -> None:
            statuses.append(httpx2.post(url + PATH, json={"prompt": "abc", "max_tokens": 2}, timeout=60).status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda: metrics(url)["vllm:num_requests_running"] == 1)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        thread.join(60)
        assert server.stderr is not None and "Traceback" not in server.stderr.read()
    assert statuses == [503]


def test_an_engine_whose_thread_fails_ends_the_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The engine fails outside of its steps, as it lets go of a request whose client has left."""
    llm = AsyncLLM(folder, **OPTIONS)

    fetch = llm.engine.runner.fetch

    def slow(*arguments: Any) -> Any:
        time.sleep(0.1)
        return fetch(*arguments)

    def failing(request_id: str) -> None:
        raise KeyError("no such page")

    monkeypatch.setattr(llm.engine.runner, "fetch", slow)
    with serving(llm) as (url, statuses):
        body = {"prompt": "abc", "max_tokens": 100, "ignore_eos": True, "stream": True, "temperature": 0}
        with httpx2.stream("POST", url + PATH, json=body, timeout=60) as response:
            next(response.iter_lines())
            monkeypatch.setattr(llm.engine, "abort_request", failing)
        wait_for(lambda: health(url) in (503, 0))
    assert statuses == [1] and capfd.readouterr().err.splitlines()[-1] == "pjax: the engine died: KeyError: 'no such page'"


def test_shutdown_does_not_wait_for_a_prompt_that_is_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "LATE", 0.0)
    llm = ScriptedLLM(tmp_path, "x")
    begun, gate = threading.Event(), threading.Event()

    def encode(*arguments: Any) -> list[int]:
        begun.set()
        gate.wait()
        return [1]

    with start(llm, drain_seconds=0.1) as server:
        monkeypatch.setattr(llm.engine.tokenizer, "encode", encode)

        def ask() -> None:
            with contextlib.suppress(httpx2.TransportError):
                httpx2.post(server.url + PATH, json={"prompt": "abc"}, timeout=60)

        thread = threading.Thread(target=ask)
        thread.start()
        assert begun.wait(60)
        server.stop()
        assert not gate.is_set()
        gate.set()
        thread.join(60)


def test_an_engine_that_is_shut_down_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = ScriptedLLM(tmp_path, "x")

    def failing() -> None:
        raise RuntimeError("no figures")

    with start(llm) as server:
        assert [httpx2.get(server.url + path).status_code for path in OBSERVED] == [200, 200, 200]
        llm.is_running = False
        assert [httpx2.get(server.url + path).status_code for path in OBSERVED] == [503, 503, 200]
        assert "the engine is shut down" in httpx2.get(f"{server.url}/health").text
        monkeypatch.setattr(llm, "stats", failing)
        assert [httpx2.get(server.url + path).status_code for path in OBSERVED] == [503, 503, 503]


def test_after_a_limit_requests_are_told_that_the_server_ends(tmp_path: Path) -> None:
    llm = ScriptedLLM(tmp_path, "x" * 2000, pause=0.01)
    answers: list[httpx2.Response] = []
    with start(llm, drain_seconds=0.3) as server:

        def ask(streamed: bool) -> None:
            answers.append(httpx2.post(server.url + PATH, json={"prompt": "a", "stream": streamed}, timeout=60))

        threads = [threading.Thread(target=ask, args=(streamed,)) for streamed in (False, True)]
        for thread in threads:
            thread.start()
        wait_for(lambda: llm.num_open == 2)
        server.stop()
        for thread in threads:
            thread.join()
    assert llm.num_open == 0
    streamed, plain = sorted(answers, key=lambda answer: answer.status_code)
    assert plain.status_code == 503 and "shutting down" in plain.json()["error"]["message"]
    lines = [line for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert streamed.status_code == 200 and lines[-1] == "data: [DONE]" and len(lines) > 5
    assert "shutting down" in json.loads(lines[-2][6:])["error"]["message"]


def test_a_draining_server_takes_no_more(tmp_path: Path) -> None:
    with start(ScriptedLLM(tmp_path, "x")) as server, httpx2.Client(base_url=server.url) as client:
        assert client.get("/ready").status_code == 200
        server.server._bridge.drain()
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
        response = client.post(PATH, json={"prompt": "a"})
        assert response.status_code == 503 and response.headers["connection"] == "close"


def test_a_dead_engine_is_told_by_health_and_ends_the_server(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    llm = ScriptedLLM(tmp_path, "x")
    with serving(llm) as (url, statuses):
        llm.is_running, llm.error = False, EngineDeadError("boom")
        assert health(url) in (503, 0)
    assert statuses == [1] and capfd.readouterr().err.splitlines()[-1] == "pjax: the engine died: EngineDeadError: boom"


def test_requests_of_a_dead_engine_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "LATE", 0.0)
    llm = ScriptedLLM(tmp_path, "x", pause=10**6)
    with serving(llm, drain_seconds=10**6) as (url, statuses):

        def ask() -> None:
            with contextlib.suppress(httpx2.TransportError):
                httpx2.post(url + PATH, json={"prompt": "abc"}, timeout=60)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda: llm.num_open == 1)
        llm.is_running, llm.error = False, EngineDeadError("boom")
    thread.join(60)
    assert statuses == [1] and llm.num_open == 0


def workers_of(server: subprocess.Popen[str]) -> list[int]:
    """Processes that render the server's templates."""
    children = [int(child) for path in Path(f"/proc/{server.pid}/task").glob("*/children") for child in path.read_text().split()]
    return [child for child in children if b"template_worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_running(process_id: int) -> bool:
    """Whether there is such a process that has not ended; nobody may have asked for its status yet."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_second_of_two_servers_on_one_port_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first one is still loading its model then, and gets the port's connections later."""
    first = bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    with first:
        with pytest.raises(ConfigError, match=f"port {port} of '127.0.0.1' can't be taken: it is in use"):
            bind("127.0.0.1", port)
        assert cli.main(["serve", "/no/such/model", "--port", str(port)]) == 2
        assert capsys.readouterr().err == f"pjax serve: port {port} of '127.0.0.1' can't be taken: it is in use\n"
    bind("127.0.0.1", port).close()  # a port whose server has ended can be taken again


@pytest.mark.parametrize("content", ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_bad_certificate_is_named_before_the_model_is_loaded(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cert.pem").write_text(content)
    assert cli.main(["serve", "/no/such/model", "--port", "0", "--ssl-certfile", str(tmp_path / "cert.pem")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"ssl_certfile '{tmp_path}/cert.pem' and ssl_keyfile" in told and "can't be used" in told


def test_a_key_with_a_password_is_refused_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    files = {"ssl_certfile": str(tmp_path / "cert.pem"), "ssl_keyfile": str(tmp_path / "key.pem")}
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-passout", "pass:secret", "-days", "2", "-subj", "/CN=x"]
    subprocess.run([*command, "-keyout", files["ssl_keyfile"], "-out", files["ssl_certfile"]], check=True, capture_output=True)
    with pytest.raises(ConfigError, match="the key has a password, but must have none"):
        run(ServerConfig(model="/no/such/model", port=0, **files))


@pytest.mark.parametrize("num_signals", [1, 2])
def test_sigterm_ends_in_time_whatever_renders_and_a_second_one_changes_nothing(folder: Path, num_signals: int) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    setting = "import pjax.server.templates as t; t.Renderer.__init__.__defaults__ = (3600.0,)"
    statuses: list[int] = []
    with process(folder, setting, drain_seconds=1, chat_template=endless) as (server, url):

        def chat() -> None:
            body = {"messages": [{"role": "user", "content": "a"}]}
            statuses.append(httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code)

        threads = [threading.Thread(target=chat) for _ in range(6)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(workers_of(server)) == 2)
        ended = workers_of(server)
        assert health(url) == 200
        for _ in range(num_signals):
            server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        for thread in threads:
            thread.join(60)
        assert server.stderr is not None and "Traceback" not in server.stderr.read()
    assert statuses == [503] * 6
    assert not any(is_running(worker) for worker in ended)


def test_workers_end_with_a_server_that_is_killed(folder: Path) -> None:
    with process(folder, chat_template="{{ 1 }}") as (server, url):
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        assert httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        workers = workers_of(server)
        server.kill()
        assert server.wait(60) == -signal.SIGKILL
        assert workers
        wait_for(lambda: not any(is_running(worker) for worker in workers))


def test_every_request_is_ended_though_one_expires_just_now(tmp_path: Path) -> None:
    llm = ScriptedLLM(tmp_path, "x" * 2000, pause=0.01)
    answers: list[int] = []
    with start(llm, drain_seconds=0.1) as server:
        bridge = server.server._bridge

        class Expired:
            def expired(self) -> bool:
                return True

            def reschedule(self, when: float) -> None:
                raise RuntimeError("Cannot change state of expired Timeout")

        def ask() -> None:
            answers.append(httpx2.post(server.url + PATH, json={"prompt": "a"}, timeout=60).status_code)

        bridge._deadlines.add(Expired())  # type: ignore[arg-type]
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_for(lambda: llm.num_open == 3)
        server.stop()
        for thread in threads:
            thread.join(60)
    assert answers == [503] * 3


def test_what_is_wrong_is_told_before_the_model_is_loaded(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of '127.0.0.1' can't be taken: it is in use"):
            run(ServerConfig(model=str(folder), port=port))
    with pytest.raises(ConfigError, match=r"chat template nowhere.jinja is not readable as a file of UTF-8"):
        run(ServerConfig(model=str(folder), port=0, chat_template="nowhere.jinja"))
