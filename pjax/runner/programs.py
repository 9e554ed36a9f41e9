"""The compiled programs of an engine: each is compiled when it is needed first, or in the background before."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any

from tqdm import tqdm

from pjax.runner.batch import Bucket, SampleShape, ScoreShape

log = logging.getLogger(__name__)

Shape = Bucket | SampleShape | ScoreShape
"""The forward program of a bucket, the sample program of a number of rows, the program that scores a number of prompt tokens."""

NUM_THREADS = 2


class Programs:
    """Compiled programs by shape.

    `get`, `prefetch` and `num_compilations` belong to one thread, the one that runs steps; compilation has threads of its own.

    Args:
      compile_it: compiles the program of a shape, or takes it from disk. Called in any thread.
    """

    def __init__(self, compile_it: Callable[[Shape], Any]) -> None:
        self.compile_it = compile_it
        self.num_compilations = 0
        """Programs that were asked for so far, each counted once."""
        self.is_waiting = False
        """Whether `get` waits for a compilation now, here or on another host. Any thread may read it."""
        self.on_compiled: Callable[[], None] | None = None
        """Called when a program that is needed now has been compiled, before it runs: on other hosts that may take longer."""
        self.threads = ThreadPoolExecutor(max_workers=NUM_THREADS, thread_name_prefix="pjax-compile")
        self._compiled: dict[Shape, Any] = {}
        self._pending: dict[Shape, Future[Any]] = {}
        self._is_closed = False

    def get(self, shape: Shape) -> Any:
        """The compiled program; waits for its compilation, and raises what failed there: the next call tries again."""
        if shape not in self._compiled:
            self.prefetch(shape)
            self.is_waiting = True
            try:
                self._compiled[shape] = self._pending.pop(shape).result()
                self.num_compilations += 1
                if self.on_compiled is not None:
                    self.on_compiled()
            finally:
                self.is_waiting = False
        return self._compiled[shape]

    def prefetch(self, *shapes: Shape, in_turn: bool = False) -> None:
        """Starts compiling programs in the background; `in_turn`: when those before them are done."""
        earlier = list(self._pending.values()) if in_turn else []
        for shape in shapes:
            if shape not in self._compiled and shape not in self._pending:
                self._pending[shape] = self.threads.submit(self._compile_in_turn, shape, earlier)

    def warmup(self, shapes: Iterable[Shape], *, progress: bool) -> None:
        """Compiles all of `shapes`, two at a time, with a progress bar."""
        wanted = [shape for shape in shapes if shape not in self._compiled]
        self.prefetch(*wanted)
        with tqdm(wanted, desc="Compiling steps", unit="program", leave=False, disable=None if progress else True) as bar:
            for shape in bar:
                bar.set_postfix_str(shape.name)
                self.get(shape)

    @property
    def is_compiling(self) -> bool:
        """Whether a program is being compiled in the background."""
        return any(not future.done() for future in self._pending.values())

    def texts(self) -> dict[str, str]:
        """The HLO of the compiled programs by their names."""
        return {shape.name: program.as_text() for shape, program in self._compiled.items()}

    def _compile_in_turn(self, shape: Shape, earlier: Sequence[Future[Any]]) -> Any:
        wait(earlier)  # they are running: this thread had to take them first
        if self._is_closed:
            raise CancelledError
        started = time.perf_counter()
        compiled = self.compile_it(shape)
        log.debug("compiled %s in %.1f s", shape.name, time.perf_counter() - started)
        return compiled

    def close(self) -> None:
        """Stops the compiling threads; what they have not begun is dropped."""
        self._is_closed = True
        self.threads.shutdown(wait=False, cancel_futures=True)
