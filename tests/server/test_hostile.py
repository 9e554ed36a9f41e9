"""Clients that leave, stall, half-close or come by hundreds: no page leaks, and whoever stays gets what it would get alone."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from typing import Any

import httpx2
import pytest

from pjax import LLM, SamplingParams
from tests.server.common import Running, idle, metrics, wait_for

PATH = "/v1/completions"
PROMPTS = ["".join(chr(97 + (7 * i + j) % 26) for j in range(3 + 3 * i)) for i in range(12)]


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def body(index: int, **more: Any) -> dict[str, Any]:
    return {"prompt": PROMPTS[index], "temperature": 0, "max_tokens": 24, "ignore_eos": True, "return_token_ids": True} | more


async def whole(client: httpx2.AsyncClient, index: int) -> list[int]:
    response = await client.post(PATH, json=body(index))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


async def leave(client: httpx2.AsyncClient, index: int, rng: random.Random) -> None:
    """A stream or a whole answer that nobody waits for."""
    patience = rng.random() * 0.3
    try:
        async with asyncio.timeout(patience):
            if rng.random() < 0.5:
                await client.post(PATH, json=body(index, max_tokens=90))
            else:
                async with client.stream("POST", PATH, json=body(index, max_tokens=90, stream=True, n=1)) as response:
                    async for _ in response.aiter_lines():
                        pass
    except (TimeoutError, httpx2.HTTPError):
        pass


def head(server: Running, content: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.settimeout(60)
    line = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    connection.sendall(line % len(content) + content)
    return connection


STREAM = b'{"prompt": "abc", "max_tokens": 120, "stream": true, "ignore_eos": true, "temperature": 0}'


def test_disconnects_at_random_moments_under_load(server: Running, expected: list[list[int]]) -> None:
    rng = random.Random(6)

    async def main() -> list[list[int]]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=120, limits=httpx2.Limits(max_connections=None)) as client:
            leaving = [asyncio.create_task(leave(client, rng.randrange(len(PROMPTS)), rng)) for _ in range(60)]
            staying = await asyncio.gather(*[whole(client, index) for index in range(len(PROMPTS))])
            await asyncio.gather(*leaving)
            return staying

    before = metrics(server.url)
    assert asyncio.run(main()) == expected
    wait_for(lambda: idle(server.url))
    ended = metrics(server.url)
    assert ended["vllm:request_success_total.abort"] > before["vllm:request_success_total.abort"], "nobody left in time"


def test_a_disconnect_frees_the_pages_at_once(server: Running) -> None:
    wait_for(lambda: idle(server.url))
    for content in (STREAM, STREAM.replace(b'"stream": true', b'"n": 1')):
        connection = head(server, content)
        wait_for(lambda: server.llm.stats().num_running > 0)
        before = server.llm.stats()
        connection.close()
        wait_for(lambda: server.llm.stats().num_running == 0)
        after = server.llm.stats()
        assert after.num_used_pages == 0
        assert after.generation_tokens - before.generation_tokens < 110, "it ran to its end"


def test_half_closed_sockets_and_slow_readers(server: Running, expected: list[list[int]]) -> None:
    slow = [head(server, STREAM) for _ in range(8)]  # nobody reads these for now
    half = [head(server, STREAM) for _ in range(8)]
    for connection in half:
        connection.shutdown(socket.SHUT_WR)
    cut = [head(server, STREAM[:30] + b" " * 10) for _ in range(8)]  # no JSON
    short = socket.create_connection(("127.0.0.1", server.port))
    short.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{")  # the rest never comes

    async def main() -> list[list[int]]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=120) as client:
            return await asyncio.gather(*[whole(client, index) for index in range(len(PROMPTS))])

    assert asyncio.run(main()) == expected
    for connection in cut:
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    for connection in slow:
        said = b""
        while b"[DONE]" not in said:
            more = connection.recv(65536)
            assert more, "a slow reader's answer was cut"
            said += more
    for connection in (*slow, *half, *cut, short):
        connection.close()
    wait_for(lambda: idle(server.url))


@pytest.mark.slow
def test_500_connections_at_once(server: Running, expected: list[list[int]]) -> None:
    async def main() -> list[list[int]]:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx2.AsyncClient(base_url=server.url, timeout=240, limits=limits) as client:
            return await asyncio.gather(*[whole(client, i % len(PROMPTS)) for i in range(500)])

    answers = asyncio.run(main())
    assert answers == [expected[i % len(PROMPTS)] for i in range(500)]
    wait_for(lambda: idle(server.url))


def test_garbage_on_the_wire(server: Running) -> None:
    rng = random.Random(3)
    whole_request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n" + b'{"prompt": "abc"}'
    )
    for _ in range(60):
        data = bytearray(whole_request)
        for _ in range(rng.randrange(1, 12)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.settimeout(20)
            connection.sendall(bytes(data))
            connection.shutdown(socket.SHUT_WR)
            said = connection.recv(65536) if rng.random() < 0.7 else b""
            assert not said.startswith(b"HTTP/1.1 5")
    assert httpx2.get(f"{server.url}/health").status_code == 200
    wait_for(lambda: idle(server.url))


def test_too_many_wait(server: Running) -> None:
    """One more than may wait is told to come back; those who wait get their answers."""
    wait_for(lambda: idle(server.url))
    server.llm.max_waiting = 4
    statuses: list[int] = []

    def ask() -> None:
        response = httpx2.post(f"{server.url}{PATH}", json=body(0, max_tokens=60), timeout=120)
        if response.status_code == 429:
            assert response.headers["retry-after"] == "1" and response.json()["error"]["code"] == "rate_limit_exceeded"
        statuses.append(response.status_code)

    try:
        threads = [threading.Thread(target=ask) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        server.llm.max_waiting = 1000
    assert set(statuses) == {200, 429} and statuses.count(200) >= 12
