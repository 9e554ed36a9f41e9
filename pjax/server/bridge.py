"""From HTTP to the engine: one request's prompts run as tasks, whose ends nobody can miss: done, failed, too late, or nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from pjax.engine import AsyncLLM
from pjax.errors import EngineDeadError, InvalidRequestError, QueueFullError
from pjax.outputs import RequestOutput
from pjax.params import BeamSearchParams, SamplingParams
from pjax.server.errors import ApiError
from pjax.server.metrics import ServerMetrics

T = TypeVar("T")
Params = SamplingParams | BeamSearchParams


class ClientGoneError(Exception):
    """The client closed its connection; nobody reads an answer."""


class Bridge:
    """What all requests share: the engine, its time limits, whether the server is ending.

    Args:
      request_timeout: seconds until a request is aborted.
    """

    def __init__(self, llm: AsyncLLM, metrics: ServerMetrics, request_timeout: float) -> None:
        self.llm = llm
        self.metrics = metrics
        self.request_timeout = request_timeout
        self.draining = False
        self._deadlines: set[asyncio.Timeout] = set()
        self._num_preparing = 0
        self.on_end: list[Callable[[], None]] = []
        """Called by `end_all`."""

    @property
    def num_unfinished(self) -> int:
        """Prompts that are in the engine."""
        return len(self._deadlines)

    def check_open(self) -> None:
        """ApiError 503 when no request can be taken any more."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", headers={"Connection": "close"})
        if not self.llm.is_running:
            raise EngineDeadError("the engine is not running")

    def drain(self) -> None:
        """New requests are refused from now on; those that there are may end."""
        self.draining = True

    def end_all(self) -> None:
        """Aborts every request, also those whose chat template renders, each of which tells its client so."""
        self.draining = True
        for deadline in list(self._deadlines):
            if not deadline.expired():  # one that expires just now cannot be changed, and ends its request anyway
                deadline.reschedule(asyncio.get_running_loop().time())
        for call in self.on_end:
            call()

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Counts a request while its prompts become tokens.

        Raises QueueFullError when more wait and are prepared than may wait, so that no work is done for a request that is refused.
        """
        self.check_open()
        self.llm.check_room(self._num_preparing)
        self._num_preparing += 1
        try:
            yield
        finally:
            self._num_preparing -= 1

    def start(self, prompts: Sequence[Sequence[int]], params: Params, request_id: str, options: Mapping[str, Any]) -> Generation:
        """Puts prompts into the engine; the caller must close what it gets."""
        self.check_open()
        return Generation(self, prompts, params, request_id, options)

    async def read(self, index: int, outputs: AsyncIterator[RequestOutput], generation: Generation) -> None:
        """Reads one prompt's outputs to their end, whatever it is."""
        observer = self.metrics.observer()
        error: Exception | None = None
        try:
            async with asyncio.timeout(self.request_timeout) as deadline:
                self._deadlines.add(deadline)
                try:
                    async with aclosing(outputs) as outputs:  # type: ignore[type-var]
                        async for output in outputs:
                            observer.observe(output)
                            for sequence in output.outputs:
                                if sequence.finish_reason == "error":
                                    raise ApiError(500, str(sequence.stop_reason))
                            generation.put(index, output)
                finally:
                    self._deadlines.discard(deadline)
        except TimeoutError:
            if self.draining:
                error = ApiError(503, "the server is shutting down")
            else:
                error = ApiError(504, f"the request took longer than {self.request_timeout:g} seconds")
        except Exception as caught:  # told to the one who asked
            error = caught
        finally:
            refused = isinstance(error, InvalidRequestError | QueueFullError | EngineDeadError)
            observer.close(refused=refused, failed=isinstance(error, ApiError) and error.status == 500)
            generation.end(error)


class Generation:
    """One HTTP request's prompts in the engine: an iterator over (index of the prompt, its newest output).

    A reader that is slower than the engine gets fewer and longer outputs.
    """

    def __init__(
        self, bridge: Bridge, prompts: Sequence[Sequence[int]], params: Params, request_id: str, options: Mapping[str, Any]
    ) -> None:
        self.request_id = request_id
        self._latest: dict[int, RequestOutput] = {}
        self._news = asyncio.Event()
        self._error: Exception | None = None
        self._num_open = len(prompts)
        self._accepted: set[int] = set()
        self._tasks = [asyncio.create_task(self._read(bridge, index, prompt, params, options)) for index, prompt in enumerate(prompts)]

    async def _read(self, bridge: Bridge, index: int, prompt: Sequence[int], params: Params, options: Mapping[str, Any]) -> None:
        accept = partial(self.accept, index)
        outputs = bridge.llm.generate(list(prompt), params, f"{self.request_id}-{index}", on_accepted=accept, **options)
        await bridge.read(index, outputs, self)

    def accept(self, index: int) -> None:
        """The engine has queued a prompt."""
        self._accepted.add(index)
        self._news.set()

    def put(self, index: int, output: RequestOutput) -> None:
        """A prompt has a newer output."""
        self._accepted.add(index)
        self._latest.pop(index, None)
        self._latest[index] = output
        self._news.set()

    def end(self, error: Exception | None) -> None:
        """A prompt has ended."""
        self._num_open -= 1
        self._error = self._error or error
        self._news.set()

    def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        """Raises what the first prompt that failed failed of, after what has come before."""
        while True:
            if self._latest:
                index = next(iter(self._latest))
                return index, self._latest.pop(index)
            if self._error is not None:
                raise self._error
            if self._num_open == 0:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()

    async def ready(self) -> None:
        """Waits until every prompt is queued, and so none can be refused any more; raises what one failed of."""
        while self._error is None and len(self._accepted) < len(self._tasks) and self._num_open:
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            raise self._error

    async def last(self) -> list[RequestOutput]:
        """Every prompt's last output."""
        found: dict[int, RequestOutput] = {}
        async for index, output in self:
            found[index] = output
        return [found[index] for index in sorted(found)]

    async def close(self) -> None:
        """Aborts what still runs; its pages are free with the engine's next step."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, given up when the client goes: ClientGoneError."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGoneError
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
