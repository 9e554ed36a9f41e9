"""`AsyncLLM`: the engine in a thread of its own, an async iterator for each request.

Whoever waits for the engine is in `AsyncLLM._waiting`, from the moment of the call until it has its answer. When the engine's thread
ends, or is given up, everybody there is told so, and nobody is added any more: a caller never waits for a thread that answers nobody.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path
from typing import Any

from pjax.config import EngineConfig, check_step_timeout
from pjax.engine.engine import LLMEngine, Prepared
from pjax.engine.intake import Prompt
from pjax.engine.stats import EngineStats
from pjax.errors import EngineDeadError, PjaxError, QueueFullError, RequestFailedError
from pjax.outputs import RequestOutput
from pjax.params import BeamSearchParams, SamplingParams

log = logging.getLogger(__name__)

RETRIES = 1  # of a failed step with the same requests; then those that run are given up
MAX_FAILURES = 3  # steps failed one after the other: the engine is dead
STEP_TIMEOUT = 300.0  # seconds; no step of a device that works takes as long
CLOSE_SECONDS = 3.0  # that closing waits for a step to end
WATCH_SECONDS = 1.0  # between two looks at a step's time, at most
BAD_ARGUMENTS = (PjaxError, TypeError, AttributeError)  # of a call that has changed nothing


class _Waiter:
    """What a caller waits for in its event loop: the result of a call, or that the engine has taken a request."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.result: asyncio.Future[Any] = loop.create_future()

    def settle(self, value: Any, error: BaseException | None = None) -> None:
        """In the loop. The first call counts."""
        if not self.result.done():
            if error is None:
                self.result.set_result(value)
            else:
                self.result.set_exception(error)

    def fail(self, error: BaseException) -> None:
        """In the loop: no answer comes."""
        self.settle(None, error)


class _Stream(_Waiter):
    """Where one request's outputs arrive. Outputs are cumulative, so a slow reader needs the newest only: nothing piles up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._news = asyncio.Event()
        self._latest: RequestOutput | None = None
        self._error: BaseException | None = None

    def put(self, output: RequestOutput) -> None:
        """In the loop."""
        self._latest = output
        self._news.set()

    def fail(self, error: BaseException) -> None:
        """In the loop: nothing comes after what has come."""
        super().fail(error)
        self._error = error
        self._news.set()

    async def next(self) -> RequestOutput:
        """The newest output that was not given yet; when there is none, raises what ended the request."""
        await self._news.wait()
        output, self._latest = self._latest, None
        if output is None:
            assert self._error is not None
            raise self._error
        if self._error is None:
            self._news.clear()
        return output


class AsyncLLM:
    """A model that serves many callers at once.

    One thread steps the engine; `generate` may be called from any event loop. A bad request fails alone.

    A step that fails is tried again. The engine dies (`error` is set, and every caller gets EngineDeadError) when steps fail again and
    again, when its thread fails in anything else, and when a step takes longer than `step_timeout`.

    Args:
      max_waiting: most requests that wait beyond those for which there is a row; None is no bound.
      step_timeout: seconds that a step may take until the device counts as hung, default 300; 0 or None is no bound. The time in which
        a step waits for weights or for a program that is being compiled does not count.
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
        step_timeout: float | None = STEP_TIMEOUT,
        **options: Any,
    ) -> None:
        check_step_timeout(step_timeout)
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
        self._lock = threading.Lock()  # of `error` and the next two
        self._waiting: set[_Waiter] = set()  # callers that have no last answer yet
        self._over = threading.Event()  # the thread answers nobody any more: it has ended, or hangs
        self._closing = False
        self._streams: dict[str, _Stream] = {}  # the engine's thread alone uses it
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopped = False
        self._num_failures = 0
        self._turn: object | None = None  # one for each step and call; None while the thread waits for work
        self._thread = threading.Thread(target=self._run, name="pjax-engine", daemon=True)
        self._thread.start()
        if step_timeout:
            threading.Thread(target=self._watch, args=(step_timeout,), name="pjax-watchdog", daemon=True).start()
        if self.engine.hosts is not None:
            self.engine.hosts.tell_clients_by(lambda why: self._die(EngineDeadError(why)))

    # ---- for callers, in their event loops

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return not self._closing and not self._over.is_set()

    @property
    def has_ended(self) -> bool:
        """Whether the engine's thread has ended. After `close` it has not when a step hangs or waits for a compilation."""
        return not self._thread.is_alive()

    def stats(self) -> EngineStats:
        """A snapshot of the engine's figures."""
        return self.engine.stats()

    def check_room(self, num_more: int = 0) -> None:
        """QueueFullError when a request that comes now, and so many before it that are not in the engine yet, could not be queued."""
        waiting = self.engine.num_beyond_rows(num_more)
        if self.max_waiting is not None and waiting >= self.max_waiting:
            raise QueueFullError(f"{waiting} requests wait already, and at most {self.max_waiting} may")

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams | None = None,
        request_id: str | None = None,
        *,
        on_accepted: Callable[[], None] | None = None,
        **request: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The request's outputs as they come, each with all that there is so far; the last one is finished.

        A reader that is slower than the engine gets fewer and longer ones. Closing the iterator, or cancelling the task
        that reads it, aborts the request.

        Args:
          on_accepted: called in the event loop once the engine has queued the request, before its first output.
          request: what `LLMEngine.add_request` takes beside: cache_salt, …

        Raises InvalidRequestError for a bad request, QueueFullError when too many wait, RequestFailedError when steps with
        this request failed, and EngineDeadError when the engine died or is shut down.
        """
        stream = _Stream(asyncio.get_running_loop())
        self._wait_for(stream)
        name = f"async-{next(self._names)}" if request_id is None else request_id
        sent = finished = False
        try:
            prepared = await self._prepare(stream, partial(self.engine.prepare, prompt, params, name, **request))
            self._inbox.put(partial(self._admit, prepared, stream))
            sent = True
            await stream.result
            if on_accepted is not None:
                on_accepted()
            while not finished:
                output = await stream.next()
                finished = output.finished
                yield output
        finally:
            self._forget(stream)
            if sent and not finished:
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
        while self._waiting and not self._over.is_set() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Aborts all requests and stops the thread, for which it waits 3 seconds at most.

        A step that hangs, or that waits for a compilation, leaves the thread behind (`has_ended` tells): its callers get
        EngineDeadError, and it ends with the step.
        """
        self._closing = True
        self._inbox.put(self._stop)
        self._thread.join(CLOSE_SECONDS)
        if not self.has_ended:
            log.warning("the engine's thread is left behind: its step has not ended within %g seconds", CLOSE_SECONDS)
            atexit.register(self._thread.join, CLOSE_SECONDS)  # native code that comes back to an interpreter that is gone may crash
            self._end(EngineDeadError("the engine is shut down"))
        self.engine.close()

    def _wait_for(self, waiter: _Waiter) -> None:
        """From now on the caller is told when the engine ends. EngineDeadError when it has ended."""
        with self._lock:
            if self.error is not None:
                raise self._death()
            if not self.is_running:
                raise EngineDeadError("the engine is shut down")
            self._waiting.add(waiter)

    def _forget(self, waiter: _Waiter) -> None:
        self._answered(waiter)
        waiter.result.cancel()  # what comes too late is nobody's

    async def _prepare(self, stream: _Stream, prepare: Callable[[], Prepared]) -> Prepared:
        """The request prepared in a thread; raises at once when the engine ends meanwhile."""
        preparing = asyncio.ensure_future(asyncio.to_thread(prepare))
        try:
            await asyncio.wait((preparing, stream.result), return_when=asyncio.FIRST_COMPLETED)
            if not preparing.done():
                await stream.result
            return preparing.result()
        finally:
            preparing.cancel()

    async def _ask(self, call: Callable[[], Any]) -> Any:
        """Runs a call between two steps and waits for its result."""
        waiter = _Waiter(asyncio.get_running_loop())
        self._wait_for(waiter)

        def run() -> None:
            value, error = None, None
            try:
                value = call()
            except BAD_ARGUMENTS as caught:
                error = caught
            _tell(waiter.loop, partial(waiter.settle, value, error))

        try:
            self._inbox.put(run)
            return await waiter.result
        finally:
            self._forget(waiter)

    def _answered(self, waiter: _Waiter) -> None:
        """In any thread: its last answer is on its way."""
        with self._lock:
            self._waiting.discard(waiter)

    # ---- the end, in any thread

    def _death(self) -> EngineDeadError:
        return EngineDeadError(f"the engine died: {type(self.error).__name__}: {self.error}")

    def _die(self, error: BaseException) -> None:
        """The engine is dead. Its own thread may hang in a step for ever."""
        with self._lock:
            if self._over.is_set():
                return
            self.error = error
        self._end(self._death())

    def _end(self, error: EngineDeadError) -> None:
        """Tells everybody who waits that no answer comes; nobody waits from now on."""
        with self._lock:
            self._over.set()
            waiting, self._waiting = self._waiting, set()
        for waiter in waiting:
            _tell(waiter.loop, partial(waiter.fail, error))

    def _watch(self, timeout: float) -> None:
        """In the watchdog's thread: a step or call that takes too long is the engine's end."""
        interval = min(timeout / 4, WATCH_SECONDS)
        turn: object | None = None
        seconds, last = 0.0, time.monotonic()
        while not self._over.wait(interval):
            now = time.monotonic()
            # A process that was stopped for an hour has not worked for an hour.
            passed, last, before, turn = min(now - last, 2 * interval), now, turn, self._turn
            if turn is None or turn is not before:
                seconds = 0.0
            elif not self.engine.is_loading_or_compiling:
                seconds += passed
            if seconds > timeout:
                self._die(EngineDeadError(f"a step has not ended within step_timeout, {timeout:g} seconds"))
                frame = sys._current_frames().get(self._thread.ident or 0)
                log.error("%s; the engine's thread is at\n%s", self.error, "".join(traceback.format_stack(frame) if frame else ()))
                self._end_hosts()

    def _end_hosts(self) -> None:
        if self.engine.hosts is not None and self.error is not None:
            self.engine.hosts.fail(self.error)

    # ---- in the engine's thread

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # whatever it is: a thread that ends in silence would leave its callers waiting
            self._die(error)
            log.error("the engine has died", exc_info=error)
            self._end_hosts()
        finally:
            self._end(EngineDeadError("the engine is shut down"))
            self._abandon()

    def _serve(self) -> None:
        while not self._over.is_set():
            is_idle = not self.engine.has_unfinished_requests
            while not self._stopped and (call := self._next_call(wait=is_idle)) is not None:
                is_idle = False
                self._do(call)
            if self._stopped:
                return
            if self.engine.has_unfinished_requests:
                self._do(self._step)

    def _next_call(self, *, wait: bool) -> Callable[[], None] | None:
        try:
            return self._inbox.get(block=wait)
        except queue.Empty:
            return None

    def _do(self, call: Callable[[], None]) -> None:
        self._turn = object()
        try:
            call()
        finally:
            self._turn = None

    def _step(self) -> None:
        num_steps = self.engine.num_steps
        try:
            outputs = self.engine.step()
        except Exception as error:
            if self._over.is_set():
                return  # the engine was closed, or declared dead, meanwhile
            self._num_failures += 1
            if self._num_failures >= MAX_FAILURES or isinstance(error, EngineDeadError):
                raise
            log.exception("a step failed (%d in a row)", self._num_failures)
            if self._num_failures > RETRIES:
                self._fail_running(RequestFailedError(f"steps with this request failed: {type(error).__name__}: {error}"))
            return
        if self.engine.num_steps > num_steps:  # else it gave what was ready, and no step says that the device works
            self._num_failures = 0
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput]]] = {}
        for output in outputs:
            stream = self._streams.pop(output.request_id, None) if output.finished else self._streams.get(output.request_id)
            if stream is None:
                continue  # it ended between two steps, and was dropped before this one
            by_loop.setdefault(stream.loop, []).append((stream, output))
        for loop, news in by_loop.items():
            is_told = _tell(loop, partial(_put_all, news))
            for stream, output in news:
                if not is_told:  # their loop is gone, and so are they who wait
                    self._streams.pop(output.request_id, None)
                    self.engine.abort_request(output.request_id)
                if not is_told or output.finished:
                    self._answered(stream)

    def _admit(self, prepared: Prepared, stream: _Stream) -> None:
        error: Exception | None = None
        try:
            self.check_room()
            self._streams[self.engine.submit(prepared)] = stream
        except PjaxError as caught:
            error = caught
        except Exception as caught:
            error = caught
            log.exception("request %r could not be queued", prepared.requests[0].request_id)
        _tell(stream.loop, partial(stream.settle, None, error))

    def _drop(self, request_id: str, stream: _Stream) -> None:
        """Nobody reads the request any more. An id that was refused may be another's."""
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self.engine.abort_request(request_id)

    def _abort(self, request_id: str) -> bool:
        output = self.engine.abort_request(request_id)
        stream = self._streams.pop(request_id, None)
        if stream is not None and output is not None:
            _tell(stream.loop, partial(stream.put, output))
            self._answered(stream)
        return output is not None

    def _fail_running(self, error: RequestFailedError) -> None:
        for request_id in self.engine.scheduled_last:
            stream = self._streams.pop(request_id, None)
            if stream is not None:
                self.engine.abort_request(request_id)
                _tell(stream.loop, partial(stream.fail, error))
                self._answered(stream)

    def _stop(self) -> None:
        for request_id in list(self._streams):
            self._abort(request_id)
        self._stopped = True

    def _abandon(self) -> None:
        """Frees what requests have left in an engine that is dead, as far as that goes."""
        try:
            for request_id in list(self._streams):
                del self._streams[request_id]
                self.engine.abort_request(request_id)
        except Exception:
            log.debug("a dead engine's requests could not be aborted", exc_info=True)


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
