"""AsyncLLM: many callers, one engine; whoever fails, leaves or is refused, the others get what they would get alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pjax import (
    LLM,
    AsyncLLM,
    BeamSearchParams,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    RequestFailedError,
    SamplingParams,
    models,
)
from tests.engine.common import OPTIONS, VOCAB, greedy, ids
from tests.tiny import write_model

PROMPTS = [[(7 * i + j) % VOCAB for j in range(3 + 5 * i)] for i in range(6)]


@pytest.fixture
def served(served: AsyncLLM) -> Iterator[AsyncLLM]:
    """As in all files, and nothing is left of any request in the end."""
    yield served
    served.close()
    served.engine.scheduler.check()
    assert served.engine.scheduler.pool.num_used == 0 and not served.engine.has_unfinished_requests


async def tokens(llm: AsyncLLM, prompt: Any, params: Any, name: str | None = None) -> list[int]:
    last = None
    async for output in llm.generate(prompt, params, name):
        if last is not None:  # cumulative
            assert output.outputs[0].token_ids[: len(last)] == last
        last = output.outputs[0].token_ids
    assert output.finished and last is not None
    return last


def test_many_at_once_and_streamed(served: AsyncLLM, expected: list[list[int]]) -> None:
    async def main() -> list[list[int]]:
        return await asyncio.gather(*[tokens(served, prompt, greedy(10)) for prompt in PROMPTS])

    assert asyncio.run(main()) == expected
    stats = served.stats()
    assert stats.generation_tokens == 60 and stats.prompt_tokens == sum(map(len, PROMPTS))
    assert stats.num_used_pages == 0 == stats.num_running and stats.kv_cache_usage == 0 and stats.num_steps > 10
    assert len(stats.page_owners) == OPTIONS["num_pages"] and stats.num_cached_pages > 0


def test_outputs_come_one_by_one(served: AsyncLLM) -> None:
    async def main() -> list[int]:
        return [len(output.outputs[0].token_ids) async for output in served.generate(PROMPTS[0], greedy(30))]

    counts = asyncio.run(main())
    assert counts[-1] == 30 and counts == sorted(set(counts)) and len(counts) > 5


def test_a_bad_request_fails_alone_and_at_once(served: AsyncLLM, expected: list[list[int]]) -> None:
    async def bad(prompt: Any, params: Any, name: str | None = None) -> Exception:
        with pytest.raises((InvalidRequestError, TypeError)) as caught:
            await tokens(served, prompt, params, name)
        return caught.value

    async def main() -> list[Any]:
        good = [tokens(served, prompt, greedy(10), f"good {i}") for i, prompt in enumerate(PROMPTS)]
        wrong = [bad([VOCAB], greedy()), bad([], greedy()), bad([1] * 96, greedy()), bad([1], "greedy"), bad(3, greedy())]
        return await asyncio.gather(*good, *wrong)

    results = asyncio.run(main())
    assert results[:6] == expected
    assert [str(error)[:20] for error in results[6:]] == [
        "prompt has token id 260 at 0"[:20],
        "prompt is empty, but"[:20],
        "prompt has 96 tokens, but"[:20],
        "params is str, but must"[:20],
        "prompt is int, but must"[:20],
    ]


def test_an_id_in_use_is_refused_and_its_owner_goes_on(served: AsyncLLM, expected: list[list[int]]) -> None:
    async def main() -> None:
        first = served.generate(PROMPTS[1], greedy(10), "x")
        await anext(first)
        with pytest.raises(InvalidRequestError, match="in use"):
            await tokens(served, PROMPTS[0], greedy(10), "x")
        async for output in first:
            last = output
        assert last.outputs[0].token_ids == expected[1]

    asyncio.run(main())


def test_leaving_frees_everything(served: AsyncLLM, expected: list[list[int]]) -> None:
    async def main() -> None:
        left = served.generate(PROMPTS[2], greedy(60))
        task = asyncio.create_task(tokens(served, PROMPTS[3], greedy(60)))
        await anext(left)
        stays = asyncio.create_task(tokens(served, PROMPTS[4], greedy(10)))
        await left.aclose()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await stays == expected[4]
        while served.stats().num_running:
            await asyncio.sleep(0.01)
        assert served.stats().num_used_pages == 0

    asyncio.run(main())


def test_abort_gives_a_last_output(served: AsyncLLM) -> None:
    async def main() -> None:
        stream = served.generate(PROMPTS[0], greedy(80), "a")
        await anext(stream)
        assert await served.abort("a") and not await served.abort("a") and not await served.abort("nobody")
        outputs = [output async for output in stream]
        assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"

    asyncio.run(main())


def test_a_full_queue_refuses(folder: Path, expected: list[list[int]]) -> None:
    llm = AsyncLLM(folder, max_waiting=2, **OPTIONS)

    async def main() -> None:
        running = [llm.generate([i + 1], greedy(60)) for i in range(4)]
        for stream in running:
            await anext(stream)
        waiting = [asyncio.create_task(tokens(llm, prompt, greedy(10))) for prompt in PROMPTS[:2]]
        while llm.stats().num_waiting < 2:
            await asyncio.sleep(0.005)
        with pytest.raises(QueueFullError, match="at most 2"):
            await tokens(llm, [1], greedy())
        for stream in running:
            await stream.aclose()
        assert await asyncio.gather(*waiting) == expected[:2]

    asyncio.run(main())
    llm.close()


def test_beams_and_samples(served: AsyncLLM, llm: LLM) -> None:
    async def last(params: Any) -> Any:
        return [output async for output in served.generate(PROMPTS[2], params)][-1]

    beams = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    samples = SamplingParams(n=3, seed=5, max_tokens=6, ignore_eos=True)

    async def main() -> Any:
        return await asyncio.gather(last(beams), last(samples))

    found, drawn = asyncio.run(main())
    wanted = [sequence.tokens[len(PROMPTS[2]) :] for sequence in llm.beam_search(PROMPTS[2], beams)[0].sequences]
    assert [output.token_ids for output in found.outputs] == wanted
    assert [output.token_ids for output in drawn.outputs] == [
        output.token_ids for output in llm.generate(PROMPTS[2], samples, use_tqdm=False)[0].outputs
    ]


def test_two_event_loops(served: AsyncLLM, expected: list[list[int]]) -> None:
    results: dict[int, list[int]] = {}

    def run(index: int) -> None:
        results[index] = asyncio.run(tokens(served, PROMPTS[index], greedy(10)))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[index] for index in range(4)] == expected[:4]


def fail_steps(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch, count: int, where: str = "dispatch") -> None:
    """The device fails so many times, as the runner starts a step or waits for its tokens."""
    left = [count]
    call = getattr(llm.engine.runner, where)

    def failing(*arguments: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("the device is gone")
        return call(*arguments)

    monkeypatch.setattr(llm.engine.runner, where, failing)


@pytest.mark.parametrize("where", ["dispatch", "fetch"])
def test_one_failed_step_is_tried_again(served: AsyncLLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Nobody in it loses a token."""

    async def main() -> None:
        stream = served.generate(PROMPTS[1], greedy(10))
        beside = asyncio.create_task(tokens(served, PROMPTS[3], greedy(10)))
        await anext(stream)
        fail_steps(served, monkeypatch, 1, where)
        assert [output async for output in stream][-1].outputs[0].token_ids == expected[1]
        assert await beside == expected[3]

    asyncio.run(main())
    assert served.is_running and served._num_failures == 0


@pytest.mark.parametrize("where", ["dispatch", "fetch"])
def test_requests_whose_steps_fail_are_given_up(
    served: AsyncLLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    async def main() -> None:
        stream = served.generate(PROMPTS[1], greedy(80))
        await anext(stream)
        fail_steps(served, monkeypatch, 2, where)
        with pytest.raises(RequestFailedError, match="the device is gone"):
            _ = [output async for output in stream]
        assert await tokens(served, PROMPTS[2], greedy(10)) == expected[2]

    asyncio.run(main())


def test_a_dead_engine_says_why(served: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        stream = served.generate(PROMPTS[1], greedy(80))
        await anext(stream)
        waiting = [asyncio.create_task(tokens(served, [i], greedy(80))) for i in range(6)]
        fail_steps(served, monkeypatch, 99)
        for task in waiting:
            with pytest.raises((EngineDeadError, RequestFailedError), match="the device is gone"):
                await task
        with pytest.raises(EngineDeadError, match="RuntimeError: the device is gone"):
            await tokens(served, [1], greedy())
        with pytest.raises(EngineDeadError):
            await served.abort("x")

    asyncio.run(main())
    assert not served.is_running and isinstance(served.error, RuntimeError)


def test_shutdown_drains_then_aborts(folder: Path, expected: list[list[int]]) -> None:
    llm = AsyncLLM(folder, **OPTIONS)

    async def main() -> None:
        short = asyncio.create_task(tokens(llm, PROMPTS[0], greedy(10)))
        await asyncio.sleep(0.05)
        while not llm.stats().num_running:
            await asyncio.sleep(0.005)
        stopping = asyncio.create_task(llm.shutdown(drain_seconds=30))
        await asyncio.sleep(0)
        with pytest.raises(EngineDeadError, match="shut down"):
            await tokens(llm, [1], greedy())
        assert await short == expected[0]
        await stopping

    asyncio.run(main())
    assert not llm._thread.is_alive()


def test_params_are_swapped_between_steps(served: AsyncLLM, llm: LLM, expected: list[list[int]], tmp_path: Path) -> None:
    """While a request runs: its tokens are the old model's up to the swap, and the new one's after them."""
    folder = write_model(tmp_path, seed=1)
    other, params = LLM(folder, **OPTIONS), models.load(folder, layer_mode="loop", progress=False)
    old, new = ids(llm, PROMPTS[1], greedy(80)), ids(other, PROMPTS[0], greedy(10))
    assert new != expected[0]

    async def main() -> list[int]:
        stream = served.generate(PROMPTS[1], greedy(80))
        await anext(stream)
        await served.update_params(params, restart=True)
        assert await tokens(served, PROMPTS[0], greedy(10)) == new
        return [output async for output in stream][-1].outputs[0].token_ids

    got = asyncio.run(main())
    swapped = [count for count in range(1, 80) if got[:count] == old[:count] and got[count:] != old[count:]]
    assert any(got[count:] == ids(other, PROMPTS[1] + got[:count], greedy(80 - count)) for count in swapped)
