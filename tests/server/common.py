"""What the server's tests share: a server in a thread, a scripted engine, and readers of streams and metrics."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from pjax.engine import EngineStats
from pjax.outputs import CompletionOutput, RequestMetrics, RequestOutput
from pjax.server import ServerConfig
from pjax.server.app import create_app
from pjax.server.lifecycle import Server, bind, uvicorn_config
from pjax.text.tokenizer import load_folder_tokenizer
from tests.tiny import write_tokenizer

MODEL = "tiny"
OPTIONS: dict[str, Any] = {
    "lazy": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "num_pages": 64,
    "progress": False,
}


@dataclass
class Running:
    """A server that runs."""

    url: str
    port: int
    llm: Any
    server: Server
    thread: threading.Thread

    def stop(self) -> None:
        """As a signal would."""
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@contextmanager
def start(llm: Any, model: Path | str = MODEL, **settings: Any) -> Iterator[Running]:
    """A server around an engine, until the block ends; the engine is closed after it."""
    config = ServerConfig(model=str(model), **{"served_model_name": MODEL, "port": 0} | settings)
    listener = bind(config.host, config.port)
    app = create_app(llm, config)
    server = Server(uvicorn_config(app, config), app.state.service.bridge, config.drain_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    port = listener.getsockname()[1]
    scheme = "https" if config.ssl_certfile else "http"
    running = Running(f"{scheme}://127.0.0.1:{port}", port, llm, server, thread)
    try:
        wait_for(lambda: server.started)
        yield running
    finally:
        running.stop()
        llm.close()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Until something holds; AssertionError when it never does."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came to hold"
        time.sleep(0.01)


def chunks(client: httpx2.Client, path: str, **body: Any) -> list[Any]:
    """The chunks of a stream, which must end as it should."""
    with client.stream("POST", path, json={"stream": True} | body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def metrics(url: str) -> dict[str, float]:
    """Every sample without its labels; those with a state, reason or the like have it behind a dot."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx2.get(f"{url}/metrics").text):
        for sample in family.samples:
            rest = [value for name, value in sorted(sample.labels.items()) if name not in ("model_name", "engine")]
            found[".".join([sample.name, *rest])] = sample.value
    return found


def idle(url: str) -> bool:
    """Whether nothing runs or waits, and every page is free."""
    now = metrics(url)
    return now["vllm:num_requests_running"] == now["vllm:num_requests_waiting"] == now["pjax:pages.used"] == 0


class ScriptedLLM:
    """Has AsyncLLM's interface and says what it is told to: a text character by character, an error, or nothing for long."""

    def __init__(
        self, folder: Path, text: str = "", *, error: Exception | None = None, pause: float = 0, template: str | None = None
    ) -> None:
        folder.mkdir(exist_ok=True)
        write_tokenizer(folder)
        tokenizer = load_folder_tokenizer(folder)
        tokenizer.chat_template = template or tokenizer.chat_template
        config = SimpleNamespace(page_size=16, enable_prefix_caching=True)
        self.engine = SimpleNamespace(tokenizer=tokenizer, max_model_len=4096, config=config, on_step=None)
        self.text, self.pause, self.to_raise = text, pause, error
        self.error: BaseException | None = None
        self.is_running = True
        self.prompts: list[str] = []
        self.params: list[Any] = []
        self.num_open = 0

    def check_room(self, num_more: int = 0) -> None:
        pass

    async def generate(self, prompt: list[int], params: Any, request_id: str, **options: Any) -> AsyncGenerator[RequestOutput, None]:
        self.prompts.append(self.engine.tokenizer.decode(prompt, skip_special_tokens=False))
        self.params.append(params)
        self.num_open += 1
        try:
            if self.to_raise is not None:
                raise self.to_raise
            for end in range(1, len(self.text) + 1):
                await asyncio.sleep(self.pause)
                done = "stop" if end == len(self.text) else None
                sequence = CompletionOutput(0, self.text[:end], list(range(end)), finish_reason=done)
                yield RequestOutput(request_id, None, prompt, [sequence], done is not None, 0, RequestMetrics(time.monotonic()))
        finally:
            self.num_open -= 1

    def stats(self) -> EngineStats:
        names = [name for name in EngineStats.__dataclass_fields__ if name not in ("page_owners", "page_cached")]
        return EngineStats(**(dict.fromkeys(names, 0) | {"num_pages": 1}), page_owners=np.zeros(1, np.uint8), page_cached=np.zeros(1, bool))

    def close(self) -> None:
        pass
