"""AsyncLLM when its own thread fails, hangs or is ended early: nobody waits for ever, and `is_running` says so."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import jax
import pytest

from pjax import AsyncLLM, ConfigError, EngineDeadError, InvalidRequestError, LLMEngine, models
from pjax.engine import async_llm
from tests.engine.common import OPTIONS, greedy

T = TypeVar("T")
PROMPTS = [[3, 1, 4], [2, 7, 1, 8, 2, 8]]
LONG = 90  # tokens: many steps
STEP_TIMEOUT = 2.0  # seconds; on a busy machine a step may take one


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What hangs waits for this, and goes on when the test ends."""
    event = threading.Event()
    yield event
    event.set()


async def tokens(llm: AsyncLLM, prompt: list[int], count: int) -> list[int]:
    return [output async for output in llm.generate(prompt, greedy(count))][-1].outputs[0].token_ids


async def soon(work: Awaitable[T]) -> T:
    """Its result; TimeoutError when it hangs."""
    return await asyncio.wait_for(work, 60)


async def told(work: Awaitable[Any], match: str) -> None:
    with pytest.raises(EngineDeadError, match=match):
        await soon(work)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "it never came to hold"
        time.sleep(0.005)


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        raise error

    return call


def slow_down(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.05) -> None:
    """Each step takes so long: nothing long ends before it is to fail."""
    fetch = llm.engine.runner.fetch

    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return fetch(*arguments)

    monkeypatch.setattr(llm.engine.runner, "fetch", slow)


def hang(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> threading.Event:
    """The device hangs as the next step's tokens are waited for; set when it does."""
    hangs, fetch = threading.Event(), llm.engine.runner.fetch

    def hanging(*arguments: Any) -> Any:
        hangs.set()
        gate.wait()
        return fetch(*arguments)

    monkeypatch.setattr(llm.engine.runner, "fetch", hanging)
    return hangs


def compile_slowly(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch, wait: Callable[[], Any]) -> threading.Event:
    """Every program that is not compiled yet takes so long; set when one is begun."""
    begun, compile_it = threading.Event(), llm.engine.runner.programs.compile_it

    def slow(shape: Any) -> Any:
        begun.set()
        wait()
        return compile_it(shape)

    monkeypatch.setattr(llm.engine.runner.programs, "compile_it", slow)
    return begun


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("a reader leaves", KeyError("a page")),
        ("a step", SystemExit(3)),
        ("an abort", RuntimeError("no such row")),
        ("new parameters", RuntimeError("out of device memory")),
        ("outputs are told", MemoryError("no memory")),
        ("work is looked for", KeyError("a queue")),
    ],
)
def test_an_engine_whose_thread_fails_is_dead_and_tells_everybody(
    served: AsyncLLM, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    slow_down(served, monkeypatch)

    async def main() -> None:
        leaves, stays = (served.generate(prompt, greedy(LONG)) for prompt in PROMPTS)
        await soon(anext(leaves))
        await soon(anext(stays))
        reading = asyncio.create_task(collect(stays))
        waiting = [asyncio.create_task(tokens(served, [5], LONG)) for _ in range(6)]  # more than there are rows
        await asyncio.sleep(0)
        if where == "a reader leaves":
            monkeypatch.setattr(served.engine, "abort_request", raising(error))
            await leaves.aclose()
        elif where == "a step":
            monkeypatch.setattr(served.engine, "step", raising(error))
        elif where == "an abort":
            monkeypatch.setattr(served.engine, "abort_request", raising(error))
            await told(served.abort("x"), "no such row")
        elif where == "new parameters":
            monkeypatch.setattr(served.engine, "update_params", raising(error))
            await told(served.update_params(None), "out of device memory")
        elif where == "outputs are told":
            monkeypatch.setattr(async_llm, "_put_all", None)
            monkeypatch.setattr(served, "_streams", Failing(served._streams, error))
        else:
            monkeypatch.setattr(LLMEngine, "has_unfinished_requests", property(raising(error)))
        for task in (reading, *waiting):
            await told(task, "the engine died: ")
        assert not served.is_running and served.error is not None
        assert served.error is error
        await told(tokens(served, [1], 2), "the engine died: ")
        await told(served.abort("y"), "the engine died: ")

    asyncio.run(main())
    wait_for(lambda: served.has_ended)


async def collect(stream: Any) -> list[Any]:
    return [output async for output in stream]


class Failing(dict[str, Any]):
    """The streams' table fails when an output's stream is looked for."""

    def __init__(self, streams: dict[str, Any], error: BaseException) -> None:
        super().__init__(streams)
        self._error = error

    def get(self, *arguments: Any) -> Any:
        raise self._error


def test_other_hosts_are_told_when_the_thread_fails(served: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    told_hosts: list[BaseException] = []
    error = RuntimeError("boom")
    monkeypatch.setattr(served.engine, "hosts", SimpleNamespace(fail=told_hosts.append))
    monkeypatch.setattr(served.engine, "update_params", raising(error))
    asyncio.run(told(served.update_params(None), "boom"))
    wait_for(lambda: served.has_ended)
    monkeypatch.setattr(served.engine, "hosts", None)
    assert told_hosts == [error]


def test_a_request_that_cannot_be_queued_fails_alone(served: AsyncLLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of its prompt fails: nothing of it is queued, and it takes no number, from which others' seeds are made."""
    make = served.engine._views.make

    def failing(text: str | None, requests: Any) -> Any:
        if requests[0].request_id == "bad":
            raise KeyError("no such token")
        return make(text, requests)

    monkeypatch.setattr(served.engine._views, "make", failing)

    async def main() -> None:
        beside = asyncio.create_task(tokens(served, PROMPTS[0], 10))
        with pytest.raises(KeyError, match="no such token"):
            await soon(anext(served.generate(PROMPTS[1], greedy(10), "bad")))
        assert await soon(beside) == expected[0]
        assert await soon(tokens(served, PROMPTS[1], 10)) == expected[1]

    asyncio.run(main())
    assert served.is_running
    served.engine.scheduler.check()
    assert served.engine.scheduler.pool.num_used == 0 and not served.engine.has_unfinished_requests


def test_wrong_parameters_are_their_callers_alone(served: AsyncLLM, folder: Path, expected: list[list[int]]) -> None:
    params = models.load(folder, layer_mode="loop", progress=False)

    async def main() -> None:
        with pytest.raises(ConfigError, match="params do not fit"):
            await soon(served.update_params({}))
        with pytest.raises(AttributeError):
            await soon(served.update_params(jax.tree.map(lambda leaf: "text", params)))
        await soon(served.update_params(params))
        assert await soon(tokens(served, PROMPTS[0], 10)) == expected[0]

    asyncio.run(main())
    assert served.is_running


def hold_prepare(served: AsyncLLM, monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> threading.Event:
    """Makes requests wait for the gate while they are prepared; what is set when one waits."""
    preparing, prepare = threading.Event(), served.engine.prepare

    def slow(*arguments: Any, **named: Any) -> Any:
        preparing.set()
        gate.wait()
        return prepare(*arguments, **named)

    monkeypatch.setattr(served.engine, "prepare", slow)
    return preparing


@pytest.mark.parametrize("end", ["death", "shutdown", "close"])
def test_an_end_while_a_request_is_prepared_is_told_at_once(
    served: AsyncLLM, monkeypatch: pytest.MonkeyPatch, gate: threading.Event, end: str
) -> None:
    async def main() -> None:
        preparing = hold_prepare(served, monkeypatch, gate)
        task = asyncio.create_task(tokens(served, [1], 2))
        await soon(asyncio.to_thread(preparing.wait))
        if end == "death":
            monkeypatch.setattr(served.engine, "update_params", raising(RuntimeError("boom")))
            await told(served.update_params(None), "boom")
        else:
            await soon(served.shutdown() if end == "shutdown" else asyncio.to_thread(served.close))
        await told(task, "boom" if end == "death" else "the engine is shut down")
        assert not gate.is_set() and not served.is_running
        gate.set()

    asyncio.run(main())


def test_a_request_that_is_being_prepared_is_drained(
    served: AsyncLLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    async def main() -> None:
        preparing = hold_prepare(served, monkeypatch, gate)
        task = asyncio.create_task(tokens(served, PROMPTS[0], 10))
        await soon(asyncio.to_thread(preparing.wait))
        stopping = asyncio.create_task(served.shutdown(drain_seconds=60))
        await asyncio.sleep(0.05)
        gate.set()
        assert await soon(task) == expected[0]
        await soon(stopping)

    asyncio.run(main())


class LateInbox:
    """Takes a call only when the engine's thread has ended."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm, self._inbox = llm, llm._inbox

    def get(self, **options: Any) -> Any:
        return self._inbox.get(**options)

    def put(self, call: Any) -> None:
        if call != self._llm._stop:
            self._llm.close()
            assert self._llm.has_ended
        self._inbox.put(call)


def test_what_is_ready_without_a_step_does_not_hide_that_steps_fail(served: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two failing steps the engine gives what is ready: the device has not worked meanwhile."""
    step, calls = served.engine.step, [0]

    def failing() -> list[Any]:
        calls[0] += 1
        return raising(RuntimeError("no device"))() if calls[0] % 2 else []

    monkeypatch.setattr(served.engine, "step", failing)

    async def main() -> None:
        many = [asyncio.create_task(tokens(served, [1, count], 4)) for count in range(9)]
        (await asyncio.wait(many, timeout=60))[0]
        assert {type(task.exception()).__name__ for task in many} == {"EngineDeadError"}

    asyncio.run(main())
    assert calls[0] == 2 * async_llm.MAX_FAILURES - 1 and served.error is not None
    monkeypatch.setattr(served.engine, "step", step)


@pytest.mark.parametrize("call", ["abort", "generate"])
def test_a_call_that_comes_as_the_thread_ends_is_told(served: AsyncLLM, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(served, "_inbox", LateInbox(served))
    asyncio.run(told(served.abort("x") if call == "abort" else tokens(served, [1], 2), "the engine is shut down"))


def test_a_hung_step_is_the_engines_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    llm = AsyncLLM(folder, step_timeout=STEP_TIMEOUT, **OPTIONS)

    async def main() -> None:
        slow_down(llm, monkeypatch)
        stream = llm.generate(PROMPTS[0], greedy(LONG))
        first = await soon(anext(stream))
        while llm.stats().generation_tokens < 3:
            await asyncio.sleep(0.01)
        hangs = hang(llm, monkeypatch, gate)
        await soon(asyncio.to_thread(hangs.wait))
        waiting = [asyncio.create_task(tokens(llm, [5], LONG)) for _ in range(6)]
        asking = asyncio.create_task(llm.abort("x"))
        while llm.is_running:
            await asyncio.sleep(0.01)
        seen = [first, *await soon(until_told(stream))]
        assert [output.outputs[0].token_ids for output in seen] == sorted((output.outputs[0].token_ids for output in seen), key=len)
        assert len(seen[-1].outputs[0].token_ids) == llm.stats().generation_tokens, "what nobody had read yet is not lost"
        for task in (*waiting, asking):
            await told(task, r"a step has not ended within step_timeout, 2 seconds")
        await told(llm.abort("y"), "step_timeout")
        assert not llm.is_running and isinstance(llm.error, EngineDeadError)
        await soon(llm.shutdown(drain_seconds=1000))  # waits for neither the requests nor the thread

    asyncio.run(main())
    assert not llm.has_ended and "gate.wait()" in caplog.text, "the log says where it hangs"
    gate.set()
    wait_for(lambda: llm.has_ended)
    assert llm.engine.scheduler.pool.num_used == 0


async def until_told(stream: Any) -> list[Any]:
    found: list[Any] = []

    async def read() -> None:
        async for output in stream:
            found.append(output)

    await told(read(), "step_timeout")
    return found


def test_a_call_that_hangs_on_the_device_is_the_engines_end(folder: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> None:
    llm = AsyncLLM(folder, step_timeout=STEP_TIMEOUT, **OPTIONS)
    monkeypatch.setattr(llm.engine, "update_params", lambda *arguments, **named: gate.wait())
    asyncio.run(told(llm.update_params(None), "step_timeout"))
    gate.set()
    llm.close()
    assert llm.has_ended


def test_time_for_weights_programs_nothing_or_other_steps_is_not_a_steps(
    folder: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = models.ModelSource.load

    def slow_load(self: Any, **options: Any) -> Any:
        time.sleep(STEP_TIMEOUT + 1)
        return load(self, **options)

    monkeypatch.setattr(models.ModelSource, "load", slow_load)
    llm = AsyncLLM(folder, step_timeout=STEP_TIMEOUT, **OPTIONS)
    left = [STEP_TIMEOUT + 1]
    begun = compile_slowly(llm, monkeypatch, lambda: time.sleep(left.pop() if left else 0))

    async def main() -> None:
        assert await soon(tokens(llm, PROMPTS[0], 10)) == expected[0]
        await asyncio.sleep(STEP_TIMEOUT + 0.5)
        slow_down(llm, monkeypatch, 0.7 * STEP_TIMEOUT)  # several steps together take longer than one may
        assert await soon(tokens(llm, PROMPTS[1], 4)) == expected[1][:4]

    asyncio.run(main())
    assert begun.is_set() and llm.is_running
    llm.close()


@pytest.mark.parametrize("step_timeout", [0, None])
def test_without_a_bound_steps_take_their_time(
    folder: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, gate: threading.Event, step_timeout: float | None
) -> None:
    llm = AsyncLLM(folder, step_timeout=step_timeout, **OPTIONS)
    hangs = hang(llm, monkeypatch, gate)

    async def main() -> None:
        task = asyncio.create_task(tokens(llm, PROMPTS[0], 10))
        await soon(asyncio.to_thread(hangs.wait))
        assert not [thread for thread in threading.enumerate() if thread.name == "pjax-watchdog" and thread not in before]
        gate.set()
        assert await soon(task) == expected[0]

    before = threading.enumerate()
    asyncio.run(main())
    llm.close()


@pytest.mark.parametrize("step_timeout", [-1, float("nan"), float("inf"), "5", True])
def test_a_wrong_step_timeout_is_refused(folder: Path, step_timeout: Any) -> None:
    with pytest.raises(ConfigError, match=r"step_timeout is .*, but must be seconds in \[0, 1e9\], or None"):
        AsyncLLM(folder, step_timeout=step_timeout, **OPTIONS)


@pytest.mark.parametrize("what", ["compilation", "step"])
def test_closing_waits_for_no_compilation_or_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    monkeypatch.setattr(async_llm, "CLOSE_SECONDS", 0.2)
    llm = AsyncLLM(folder, **OPTIONS)
    began = compile_slowly(llm, monkeypatch, gate.wait) if what == "compilation" else hang(llm, monkeypatch, gate)

    async def main() -> None:
        running = asyncio.create_task(tokens(llm, PROMPTS[0], 10))
        await soon(asyncio.to_thread(began.wait))
        asking = asyncio.create_task(llm.abort("x"))
        await asyncio.sleep(0)
        await soon(llm.shutdown(drain_seconds=0.1))
        for task in (running, asking):
            await told(task, "the engine is shut down")

    asyncio.run(main())
    assert not llm.has_ended and not gate.is_set()
    gate.set()
    wait_for(lambda: llm.has_ended)
    assert llm.error is None and llm.engine.scheduler.pool.num_used == 0
    assert "a step failed" not in caplog.text, "what fails since the engine is closed is no news"
    llm.close()


def test_a_last_output_is_not_lost_when_the_engine_dies_after_it(
    served: AsyncLLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        stream = served.generate(PROMPTS[0], greedy(10))
        first = await soon(anext(stream))
        while served.engine.has_unfinished_requests:  # its tokens are all there, unread
            time.sleep(0.005)
        monkeypatch.setattr(served.engine, "update_params", raising(RuntimeError("boom")))
        await told(served.update_params(None), "boom")
        last = [first, *await soon(collect(stream))][-1]
        assert last.finished and last.outputs[0].token_ids == expected[0]
        with pytest.raises((EngineDeadError, InvalidRequestError)):
            await tokens(served, [1], 2)

    asyncio.run(main())
