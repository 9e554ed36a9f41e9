"""`AsyncLLM`: the engine in a thread of its own, an async iterator for each request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path
from typing import Any

from pjax.config import EngineConfig
from pjax.engine.engine import LLMEngine, Prepared
from pjax.engine.intake import Prompt
from pjax.engine.stats import EngineStats
from pjax.errors import EngineDeadError, QueueFullError, RequestFailedError
from pjax.outputs import RequestOutput
from pjax.params import BeamSearchParams, SamplingParams

log = logging.getLogger(__name__)

RETRIES = 1  # of a failed step with the same requests; then those that run are given up
MAX_FAILURES = 3  # steps failed one after the other: the engine is dead


class _Stream:
    """Where one request's outputs arrive. Outputs are cumulative, so a slow reader needs the newest only: nothing piles up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.accepted: asyncio.Future[None] = loop.create_future()
        self._news = asyncio.Event()
        self._latest: RequestOutput | None = None
        self._error: BaseException | None = None

    def accept(self, error: BaseException | None) -> None:
        """In the loop: the engine has taken the request, or not."""
        if not self.accepted.done():
            if error is None:
                self.accepted.set_result(None)
            else:
                self.accepted.set_exception(error)

    def put(self, output: RequestOutput | BaseException) -> None:
        """In the loop."""
        if isinstance(output, BaseException):
            self._error = output
        else:
            self._latest = output
        self._news.set()

    async def next(self) -> RequestOutput:
        """The newest output that was not given yet; raises what ended the request."""
        await self._news.wait()
        self._news.clear()
        if self._error is not None:
            raise self._error
        assert self._latest is not None
        return self._latest


class AsyncLLM:
    """A model that serves many callers at once.

    One thread steps the engine; `generate` may be called from any event loop. A bad request fails alone.

    Args:
      max_waiting: most requests that wait beyond those for which there is a row; None is no bound.
      options: as for `LLM`.
    """

    def __init__(
        self,
        model: Any,
        *,
        params: Any = None,
        tokenizer: str | Path | None = None,
        skip_tokenizer_init: bool = False,
        progress: bool = True,
        max_waiting: int | None = None,
        **options: Any,
    ) -> None:
        self.engine = LLMEngine(
            model,
            EngineConfig(**options),
            params=params,
            tokenizer=tokenizer,
            skip_tokenizer_init=skip_tokenizer_init,
            progress=progress,
        )
        self.max_waiting = max_waiting
        self.error: BaseException | None = None
        """What the engine died of."""
        self._names = itertools.count()
        self._streams: dict[str, _Stream] = {}  # the engine's thread alone uses it
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = False
        self._stopped = False
        self._num_failures = 0
        self._thread = threading.Thread(target=self._run, name="pjax-engine", daemon=True)
        self._thread.start()
        if self.engine.hosts is not None:
            self.engine.hosts.tell_clients_by(self._die)

    # ---- for callers, in their event loops

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self.error is None and not self._closing

    def stats(self) -> EngineStats:
        """A snapshot of the engine's figures."""
        return self.engine.stats()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams | None = None,
        request_id: str | None = None,
        **request: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The request's outputs as they come, each with all that there is so far; the last one is finished.

        A reader that is slower than the engine gets fewer and longer ones. Closing the iterator, or cancelling the task
        that reads it, aborts the request.

        Args:
          request: what `LLMEngine.add_request` takes beside: cache_salt, …

        Raises InvalidRequestError for a bad request, QueueFullError when too many wait, RequestFailedError when steps with
        this request failed, and EngineDeadError when the engine died or is shut down.
        """
        self._check_running()
        stream = _Stream(asyncio.get_running_loop())
        name = f"async-{next(self._names)}" if request_id is None else request_id
        prepared = await asyncio.to_thread(self.engine.prepare, prompt, params, name, **request)
        finished = False
        self._inbox.put(partial(self._admit, prepared, stream))
        try:
            await stream.accepted
            while not finished:
                output = await stream.next()
                finished = output.finished
                yield output
        finally:
            if not finished:
                self._inbox.put(partial(self._drop, name, stream))

    async def abort(self, request_id: str) -> bool:
        """Ends a request, whose iterator then gives a last output of reason "abort"; False when there is none of that id."""
        return bool(await self._ask(partial(self._abort, request_id)))

    async def update_params(self, params: Any, *, restart: bool = False) -> None:
        """Swaps the parameters between two steps; see `LLMEngine.update_params`."""
        await self._ask(partial(self.engine.update_params, params, restart=restart))

    async def shutdown(self, drain_seconds: float = 0.0) -> None:
        """Takes no more requests, lets those that there are end for so many seconds, aborts the rest and stops the thread."""
        self._closing = True
        deadline = asyncio.get_running_loop().time() + drain_seconds
        while self._streams and self.error is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Aborts all requests and stops the thread."""
        self._closing = True
        if self._thread.is_alive():
            self._inbox.put(self._stop)
            self._thread.join()
        self.engine.close()

    def _check_running(self) -> None:
        if self.error is not None:
            raise EngineDeadError(f"the engine died: {type(self.error).__name__}: {self.error}")
        if self._closing:
            raise EngineDeadError("the engine is shut down")

    async def _ask(self, call: Callable[[], Any]) -> Any:
        """Runs a call between two steps and waits for its result."""
        self._check_running()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def settle(value: Any, error: BaseException | None) -> None:
            if not answer.done():
                answer.set_result(value) if error is None else answer.set_exception(error)

        def run() -> None:
            value, error = None, None
            try:
                self._check_alive()
                value = call()
            except Exception as caught:
                error = caught
            _tell(loop, partial(settle, value, error))

        self._inbox.put(run)
        return await answer

    # ---- in the engine's thread

    def _check_alive(self) -> None:
        if self.error is not None or self._stopped:
            raise EngineDeadError("the engine is shut down" if self.error is None else f"the engine died: {self.error}")

    def _run(self) -> None:
        while not self._stopped:
            busy = self.error is None and self.engine.has_unfinished_requests
            with contextlib.suppress(queue.Empty):
                self._inbox.get(block=not busy)()
                while True:
                    self._inbox.get_nowait()()
            if self.error is None and not self._stopped and self.engine.has_unfinished_requests:
                self._step()
        with contextlib.suppress(queue.Empty):
            while True:  # asked too late: each is told so
                self._inbox.get_nowait()()

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:
            self._num_failures += 1
            log.exception("a step failed (%d in a row)", self._num_failures)
            if self._num_failures >= MAX_FAILURES or isinstance(error, EngineDeadError):
                self.error = error
                self._fail_all(EngineDeadError(f"the engine died: {type(error).__name__}: {error}"))
            elif self._num_failures > RETRIES:
                self._fail_running(RequestFailedError(f"steps with this request failed: {type(error).__name__}: {error}"))
            return
        self._num_failures = 0
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput]]] = {}
        for output in outputs:
            stream = self._streams.pop(output.request_id, None) if output.finished else self._streams.get(output.request_id)
            if stream is None:
                continue  # it ended between two steps, and was dropped before this one
            by_loop.setdefault(stream.loop, []).append((stream, output))
        for loop, news in by_loop.items():
            if not _tell(loop, partial(_put_all, news)):
                for _, output in news:  # their loop is gone, and so are they who wait
                    self._streams.pop(output.request_id, None)
                    self.engine.abort_request(output.request_id)

    def _admit(self, prepared: Prepared, stream: _Stream) -> None:
        error: BaseException | None = None
        try:
            self._check_alive()
            waiting = self.engine.num_waiting_without_row
            if self.max_waiting is not None and waiting >= self.max_waiting:
                raise QueueFullError(f"{waiting} requests wait already, and at most {self.max_waiting} may")
            self._streams[self.engine.submit(prepared)] = stream
        except Exception as caught:
            error = caught
        _tell(stream.loop, partial(stream.accept, error))

    def _drop(self, request_id: str, stream: _Stream) -> None:
        """Nobody reads the request any more. An id that was refused may be another's."""
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self.engine.abort_request(request_id)

    def _abort(self, request_id: str) -> bool:
        stream, output = self._streams.pop(request_id, None), self.engine.abort_request(request_id)
        if stream is not None and output is not None:
            _tell(stream.loop, partial(stream.put, output))
        return output is not None

    def _die(self, why: str) -> None:
        """Called in a thread of the hosts' when one of them is lost: the engine's own thread may hang in a step for ever."""
        self.error = error = EngineDeadError(why)
        for stream in list(self._streams.values()):
            _tell(stream.loop, partial(stream.put, error))

    def _fail_all(self, error: BaseException) -> None:
        for request_id in list(self._streams):
            self._fail(request_id, error)

    def _fail_running(self, error: BaseException) -> None:
        for request_id in self.engine.scheduled_last:
            self._fail(request_id, error)

    def _fail(self, request_id: str, error: BaseException) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            self.engine.abort_request(request_id)
            _tell(stream.loop, partial(stream.put, error))

    def _stop(self) -> None:
        for request_id in list(self._streams):
            self._abort(request_id)
        self._stopped = True


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> bool:
    """Calls in an event loop; False when it is closed."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        return False
    return True


def _put_all(news: list[tuple[_Stream, RequestOutput]]) -> None:
    for stream, output in news:
        stream.put(output)
