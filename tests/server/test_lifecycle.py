"""From start to end: SIGTERM lets requests end, for so long; a dead engine ends the server and says why."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from pjax import LLM, ConfigError, EngineDeadError, SamplingParams
from pjax.server import ServerConfig, run
from pjax.server.lifecycle import bind, serve_llm
from tests.server.common import OPTIONS, ScriptedLLM, start, wait_for

ROOT = Path(__file__).resolve().parents[2]
PATH = "/v1/completions"
SCRIPT = """
import sys
from pjax.config import EngineConfig
from pjax.engine import LLMEngine
from pjax.server import ServerConfig, run

step, count = LLMEngine.step, 0
def dying_step(self):
    global count
    count += 1
    if count > {lifetime}:
        raise RuntimeError("the device is lost")
    return step(self)
LLMEngine.step = dying_step
options = {options}
options.pop("progress")
sys.exit(run(ServerConfig(model={model!r}, port={port}, log_level="warning", engine=EngineConfig(**options))))
"""


def free_port() -> int:
    with bind("127.0.0.1", 0) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def process(folder: Path, lifetime: int = 10**9) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, once it is ready."""
    port = free_port()
    code = SCRIPT.format(lifetime=lifetime, options=OPTIONS, model=str(folder), port=port)
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
    with process(folder, lifetime=5) as (server, url):
        # A step is tried again; then its request is given up; the third failure in a row is the engine's end.
        body = {"prompt": "abc", "max_tokens": 60, "ignore_eos": True}
        answers = [httpx2.post(url + PATH, json=body, timeout=120) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [500, 503]
        assert not any("device" in answer.text for answer in answers)
        assert server.wait(60) == 1
        assert server.stderr is not None
        assert server.stderr.read().splitlines()[-1] == "pjax: the engine died: RuntimeError: the device is lost"


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
    statuses: list[int] = []
    listener = bind("127.0.0.1", 0)
    config = ServerConfig(model="tiny")
    thread = threading.Thread(target=lambda: statuses.append(serve_llm(llm, config, listener)))  # type: ignore[arg-type]
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread.start()

    def health() -> int:
        try:
            return httpx2.get(f"{url}/health").status_code
        except httpx2.TransportError:
            return 0

    wait_for(lambda: health() == 200)
    llm.is_running, llm.error = False, EngineDeadError("boom")
    assert health() in (503, 0)
    thread.join(60)
    assert statuses == [1] and capfd.readouterr().err.splitlines()[-1] == "pjax: the engine died: EngineDeadError: boom"


def test_what_is_wrong_is_told_before_the_model_is_loaded(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of '127.0.0.1' can't be taken: it is in use"):
            run(ServerConfig(model=str(folder), port=port))
    with pytest.raises(ConfigError, match=r"chat template nowhere.jinja is not readable as a file of UTF-8"):
        run(ServerConfig(model=str(folder), port=0, chat_template="nowhere.jinja"))
