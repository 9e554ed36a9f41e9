"""One real server for the folder: uvicorn on a free port, the engine on the made-up checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pjax import LLM, AsyncLLM
from tests.server.common import OPTIONS, Running, start
from tests.tiny import write_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def llm(folder: Path) -> LLM:
    """What the server's answers are compared with."""
    return LLM(folder, **OPTIONS)


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[Running]:
    with start(AsyncLLM(folder, **OPTIONS, max_waiting=1000), folder) as running:
        yield running
        scheduler = running.llm.engine.scheduler
    scheduler.check()
    assert scheduler.pool.num_used == 0, "a page leaked"


@pytest.fixture
def client(server: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture
def post(client: httpx2.Client) -> Any:
    """Posts a body that must be answered with 200; the answer."""

    def send(path: str, **body: Any) -> Any:
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    return send
