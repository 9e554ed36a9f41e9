"""The compiled programs of an engine: each is compiled when it is needed first, or in the background before."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any

from tqdm import tqdm

from pjax.runner.batch import BlocksShape, Bucket, SampleShape, ScoreShape, WriteShape

log = logging.getLogger(__name__)

Shape = Bucket | SampleShape | ScoreShape | WriteShape | BlocksShape
"""The forward program of a bucket, the sample program of a number of rows, the program that scores a number of prompt tokens, and those
that write a row of a table."""

NUM_THREADS = 2
NICE = 19  # of the thread that compiles what nobody waits for: it takes the time that steps leave
DELAY_SECONDS = 0.5  # until it begins: what a first request needs, often at once, goes first
LOG_SECONDS = 5.0  # between two lines of its progress
EXIT_SECONDS = 60.0  # that the interpreter's end waits for a compilation that runs: ending in the middle of one may crash


class Programs:
    """Compiled programs by shape.

    `get`, `prefetch`, `hurry` and `warmup` belong to one thread, the one that runs steps. Compilation has threads of its own: two for
    what is needed, and one of low priority for the rest of `warm_in_background`.

    Args:
      compile_it: compiles the program of a shape, or takes it from disk. Called in any thread.
    """

    def __init__(self, compile_it: Callable[[Shape], Any]) -> None:
        self.compile_it = compile_it
        self.is_waiting = False
        """Whether `get` waits for a compilation now, here or on another host. Any thread may read it."""
        self.on_compiled: Callable[[], None] | None = None
        """Called when a program that is needed now has been compiled, before it runs: on other hosts that may take longer."""
        self.threads = ThreadPoolExecutor(max_workers=NUM_THREADS, thread_name_prefix="pjax-compile")
        self._lock = threading.Lock()  # for what follows; the background thread writes it too
        self._compiled: dict[Shape, Any] = {}
        self._pending: dict[Shape, Future[Any]] = {}
        self._queue: list[Shape] = []  # for the background thread, which takes the last one
        self._background: threading.Thread | None = None
        self._afterwards: Callable[[], None] | None = None
        self._is_closed = False

    def get(self, shape: Shape) -> Any:
        """The compiled program; waits for its compilation, and raises what failed there: the next call tries again."""
        if shape in self._compiled:
            return self._compiled[shape]
        self.is_waiting = True
        try:
            while shape not in self._compiled:
                self.prefetch(shape)
                if (future := self._pending.get(shape)) is not None:  # else the background thread has just ended it
                    self._finish(shape, future)
            if self.on_compiled is not None:
                self.on_compiled()
        finally:
            self.is_waiting = False
        return self._compiled[shape]

    def _finish(self, shape: Shape, future: Future[Any]) -> None:
        """Waits for a compilation and takes its result, once."""
        try:
            program = future.result()
        except BaseException:
            if future.done():  # else the wait was interrupted, and the compilation goes on
                self._drop(shape, future)
            raise
        with self._lock:
            if self._pending.pop(shape, None) is not None:
                self._compiled[shape] = program

    def _drop(self, shape: Shape, future: Future[Any]) -> None:
        with self._lock:
            if self._pending.get(shape) is future:
                del self._pending[shape]

    def has(self, *shapes: Shape) -> bool:
        """Whether all these programs are there, so that `get` does not wait."""
        return all(shape in self._compiled or _is_there(self._pending.get(shape)) for shape in shapes)

    @property
    def num_compilations(self) -> int:
        """Programs that are there, each counted once."""
        return len(self._compiled) + sum(map(_is_there, list(self._pending.values())))

    def prefetch(self, *shapes: Shape, in_turn: bool = False) -> None:
        """Starts compiling programs; `in_turn`: when those before them are done."""
        if self.has(*shapes):
            return
        with self._lock:
            earlier = list(self._pending.values()) if in_turn else []
            for shape in shapes:
                if shape not in self._compiled and shape not in self._pending:
                    self._pending[shape] = self.threads.submit(self._compile_in_turn, shape, earlier)

    def warmup(self, shapes: Iterable[Shape], *, progress: bool) -> None:
        """Compiles all of `shapes`, two at a time, with a progress bar."""
        wanted = [shape for shape in shapes if shape not in self._compiled]
        self.prefetch(*wanted)
        with tqdm(wanted, desc="Compiling", unit="program", leave=False, disable=None if progress else True) as bar:
            for shape in bar:
                bar.set_postfix_str(shape.name)
                self.get(shape)

    @property
    def is_compiling(self) -> bool:
        """Whether a program that is needed is being compiled."""
        return any(not future.done() for future in list(self._pending.values()) if not isinstance(future, _Background))

    @property
    def is_warming(self) -> bool:
        """Whether the background thread has programs left to compile. Any thread may ask."""
        return self._background is not None and self._background.is_alive()

    # ---- in the background

    def warm_in_background(self, shapes: Iterable[Shape], afterwards: Callable[[], None] | None = None) -> None:
        """Compiles `shapes` in a thread of low priority, the first ones first, one at a time; its progress is logged.

        What `get` needs meanwhile is compiled beside it. A program that does not compile is named in a warning.

        Args:
          afterwards: called in the thread when all are there.
        """
        self._queue, self._afterwards = list(shapes)[::-1], afterwards
        self._background = threading.Thread(target=_warm, args=(weakref.ref(self),), name="pjax-warmup", daemon=True)
        atexit.register(_close, weakref.ref(self))
        self._background.start()

    def hurry(self, *shapes: Shape) -> None:
        """Puts programs first in the background thread's queue."""
        with self._lock:
            wanted = [shape for shape in shapes if shape in self._queue]
            self._queue = [shape for shape in self._queue if shape not in wanted] + wanted[::-1]

    def compile_next(self) -> bool:
        """Compiles the first program of the queue, in the background thread; False when there is none left.

        Waits while programs that are needed are being compiled: they get the processor.
        """
        wait([future for future in list(self._pending.values()) if not isinstance(future, _Background)])
        with self._lock:
            while self._queue and (self._queue[-1] in self._compiled or self._queue[-1] in self._pending):
                self._queue.pop()
            if not self._queue or self._is_closed:
                return False
            shape, future = self._queue.pop(), _Background()
            self._pending[shape] = future
        try:
            future.set_result(self._compile(shape))
            self._finish(shape, future)
        except BaseException as error:
            self._drop(shape, future)
            if not future.done():
                future.set_exception(error)
            log.warning("%s was not compiled; it is tried again when it is needed: %s", shape.name, error)
        return True

    def finish_background(self) -> None:
        """Does what comes after all programs, in the background thread."""
        if self._afterwards is None or self._is_closed:
            return
        try:
            self._afterwards()
        except Exception as error:
            log.warning("copies to the host were not compiled; they are compiled when they are needed: %s", error)

    @property
    def num_queued(self) -> int:
        """Programs that the background thread has not begun."""
        return len(self._queue)

    def texts(self) -> dict[str, str]:
        """The HLO of the compiled programs by their names."""
        return {shape.name: program.as_text() for shape, program in self._compiled.items()}

    def _compile_in_turn(self, shape: Shape, earlier: Sequence[Future[Any]]) -> Any:
        wait(earlier)  # they are running: this thread had to take them first
        if self._is_closed:
            raise CancelledError
        return self._compile(shape)

    def _compile(self, shape: Shape) -> Any:
        started = time.perf_counter()
        compiled = self.compile_it(shape)
        log.debug("compiled %s in %.1f s", shape.name, time.perf_counter() - started)
        return compiled

    def close(self) -> None:
        """Stops the compiling threads; what they have not begun is dropped."""
        self._is_closed = True
        self.threads.shutdown(wait=False, cancel_futures=True)

    def join_background(self) -> None:
        """Waits for what the background thread compiles now, at most EXIT_SECONDS."""
        if self._background is not None:
            self._background.join(EXIT_SECONDS)


def _close(of: weakref.ref[Programs]) -> None:
    """At the interpreter's end."""
    if (programs := of()) is not None:
        programs.close()
        programs.join_background()


def _is_there(future: Future[Any] | None) -> bool:
    return future is not None and future.done() and not future.cancelled() and future.exception() is None


class _Background(Future[Any]):
    """A compilation that nobody waited for when it began."""


def _warm(of: weakref.ref[Programs]) -> None:
    """The background thread; it ends with the programs that it compiles for."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    started = told = time.monotonic()
    time.sleep(DELAY_SECONDS)
    while (programs := of()) is not None and programs.compile_next():
        if time.monotonic() - told > LOG_SECONDS:
            told = time.monotonic()
            log.info("compiling in the background: %d programs are there, %d to go", programs.num_compilations, programs.num_queued)
        del programs
    if programs is not None and not programs.num_queued:
        programs.finish_background()
        log.info("all %d programs are compiled, %.1f s after the start", programs.num_compilations, time.monotonic() - started)
