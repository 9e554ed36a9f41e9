"""Replicas behind Ray's HTTP proxy: streams, the death of a replica, clients that leave, an engine that dies, a drain."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from typing import Any

import httpx2
import openai
import pytest
from ray import serve

from examples.retry_stream import retried
from pjax import LLM, SamplingParams
from pjax.ray_serve import RayConfig, Replica, build_app
from tests.ray.conftest import Cluster, wait_for

NUM_REQUESTS = 200
AT_ONCE = 12
KILL_AFTER = 70  # answers
PROMPTS = [f"{index} bottles of {'beer' if index % 3 else 'wine'} on the wall, " + "la " * (index % 9) for index in range(NUM_REQUESTS)]


def tokens_of(index: int) -> int:
    return 16 + index % 17


@pytest.fixture(scope="module")
def two(cluster: Cluster) -> Cluster:
    """Two replicas."""
    serve.run(build_app({**cluster.arguments, "num_replicas": 2}), route_prefix="/")
    return cluster


def client_of(cluster: Cluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=10, timeout=300)


class Run:
    """200 streams, some at once, one replica killed on the way."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.texts: dict[int, str] = {}
        self.num_streaming = 0
        self.num_asked = 0
        self.killed: int | None = None

    async def ask(self, client: openai.AsyncOpenAI, index: int, gate: asyncio.Semaphore) -> None:
        async with gate:
            text, begun = "", False
            request: dict[str, Any] = {"max_tokens": tokens_of(index), "temperature": 0, "extra_body": {"ignore_eos": True}}
            try:
                async for piece in retried(client, model="tiny", prompt=PROMPTS[index], **request):
                    if not begun:
                        begun = True
                        self.num_streaming += 1
                    text += piece
                    await self.kill_one()
            finally:
                self.num_streaming -= begun
            self.texts[index] = text

    async def kill_one(self) -> None:
        """Once enough are answered, and several more are in the middle of their streams."""
        if self.killed is None and len(self.texts) >= KILL_AFTER and self.num_streaming >= AT_ONCE // 2:
            self.killed = self.cluster.replicas()[0].pid
            os.kill(self.killed, signal.SIGKILL)

    async def all(self) -> None:
        gate = asyncio.Semaphore(AT_ONCE)

        async def count(request: httpx2.Request) -> None:
            self.num_asked += 1

        async with client_of(self.cluster) as client:
            client._client.event_hooks["request"].append(count)
            await asyncio.gather(*(self.ask(client, index, gate) for index in range(NUM_REQUESTS)))


def test_200_streams_are_answered_though_a_replica_is_killed(two: Cluster, llm: LLM) -> None:
    wait_for(lambda: len(two.replicas()) == 2)
    before = {process.pid for process in two.replicas()}
    assert two.idle()
    run = Run(two)
    asyncio.run(run.all())
    params = [SamplingParams(temperature=0, max_tokens=tokens_of(index), ignore_eos=True) for index in range(NUM_REQUESTS)]
    expected = [output.outputs[0].text for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    assert [run.texts[index] for index in range(NUM_REQUESTS)] == expected
    assert run.killed in before
    assert run.num_asked > NUM_REQUESTS, "no stream was cut: the kill came when nothing ran there"
    print(f"{run.num_asked - NUM_REQUESTS} requests were sent again")

    def replaced() -> bool:
        now = {process.pid for process in two.replicas()}
        return len(now) == 2 and run.killed not in now

    wait_for(replaced)
    wait_for(two.idle)


def test_a_client_that_leaves_frees_its_pages(two: Cluster) -> None:
    wait_for(two.idle)

    async def leave(num: int) -> None:
        async with client_of(two) as client:
            for _ in range(num):
                stream = await client.completions.create(
                    model="tiny", prompt="a long story", max_tokens=110, temperature=0, stream=True, extra_body={"ignore_eos": True}
                )
                async for _ in stream:
                    break
                await stream.close()

    def aborted() -> float:
        return sum(samples["vllm:request_success_total.abort"] for samples in two.all_metrics().values())

    before = aborted()
    asyncio.run(leave(4))
    wait_for(lambda: aborted() == before + 4)
    wait_for(two.idle)


def test_errors_and_keys_pass_through_the_proxy(two: Cluster) -> None:
    response = httpx2.post(f"{two.url}/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 0, "bad": 1}, timeout=60)
    assert response.status_code == 400 and "bad" in response.json()["error"]["message"]
    assert httpx2.get(f"{two.url}/ready", timeout=60).status_code == 200


def fragile() -> type[Replica]:
    """A replica whose engine can be broken. A class of a function travels by value: replicas can't import tests."""

    class Fragile(Replica):
        def slow(self) -> None:
            """A stream of 100 tokens takes five seconds and more."""
            engine = self.llm.engine
            step = engine.step

            def step_slowly() -> Any:
                time.sleep(0.05)
                return step()

            engine.step = step_slowly  # type: ignore[method-assign]

        def fail(self) -> None:
            def step() -> Any:
                raise RuntimeError("the device is gone")

            self.llm.engine.step = step  # type: ignore[method-assign]

    return Fragile


def test_an_engine_that_died_is_replaced_and_its_stream_goes_on(cluster: Cluster, llm: LLM) -> None:
    options = {"name": "fragile", "health_check_period_s": 1, "ray_actor_options": {"num_cpus": 1}}
    handle = serve.run(serve.deployment(**options)(serve.ingress()(fragile())).bind(cluster.arguments), route_prefix="/")
    wait_for(lambda: len(cluster.replicas()) == 1)  # those of the test before are gone
    [before] = [process.pid for process in cluster.replicas()]
    handle.slow.remote().result()

    async def read() -> str:
        text = ""
        async with client_of(cluster) as client:
            request: dict[str, Any] = {"max_tokens": 100, "temperature": 0, "extra_body": {"ignore_eos": True}}
            async for piece in retried(client, attempts=10, model="tiny", prompt="a story", **request):
                if not text:
                    await asyncio.to_thread(lambda: handle.fail.remote().result())
                text += piece
        return text

    text = asyncio.run(read())
    [output] = llm.generate(["a story"], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True), use_tqdm=False)
    assert text == output.outputs[0].text
    assert before not in [process.pid for process in cluster.replicas()], "the stream had ended before the engine was broken"


def test_long_queues_start_a_replica_and_short_ones_end_it(cluster: Cluster) -> None:
    scaled = {"max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay": 0.5, "downscale_delay": 0.5}
    serve.run(build_app({**cluster.arguments, **scaled}), route_prefix="/")
    wait_for(lambda: len(cluster.replicas()) == 1)
    more = asyncio.Event()

    async def ask(client: openai.AsyncOpenAI) -> int:
        count = 0
        while not more.is_set():
            answer = await client.completions.create(model="tiny", prompt="a", max_tokens=100, extra_body={"ignore_eos": True})
            assert answer.usage is not None and answer.usage.completion_tokens == 100
            count += 1
        return count

    async def load() -> list[int]:
        async with client_of(cluster) as client:
            asked = [asyncio.create_task(ask(client)) for _ in range(12)]
            try:
                await asyncio.wait_for(asyncio.to_thread(wait_for, lambda: len(cluster.replicas()) == 2), 130)
            finally:
                more.set()
            return await asyncio.gather(*asked)

    assert all(asyncio.run(load()))
    wait_for(lambda: len(cluster.replicas()) == 1)


def test_a_replica_that_is_let_go_ends_its_streams_first(cluster: Cluster, llm: LLM) -> None:
    options = RayConfig(num_replicas=1).options(30)
    handle = serve.run(serve.deployment(**options)(serve.ingress()(fragile())).bind(cluster.arguments), route_prefix="/")
    handle.slow.remote().result()
    end = threading.Thread(target=serve.delete, args=("default",))

    async def read() -> str:
        text = ""
        async with client_of(cluster) as client:
            request: dict[str, Any] = {"max_tokens": 100, "temperature": 0, "extra_body": {"ignore_eos": True}}
            async for chunk in await client.completions.create(model="tiny", prompt="a story", stream=True, **request):
                if not text:
                    end.start()
                text += chunk.choices[0].text if chunk.choices else ""
        return text

    text = asyncio.run(read())
    end.join(120)
    [output] = llm.generate(["a story"], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True), use_tqdm=False)
    assert text == output.outputs[0].text
    wait_for(lambda: not cluster.replicas())
