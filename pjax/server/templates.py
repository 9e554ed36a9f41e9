"""Chat templates, rendered in processes of their own with limits of time and memory (`pjax.text.template_worker`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pjax.errors import InvalidRequestError
from pjax.server.errors import ApiError
from pjax.server.threads import Unjoined

NUM_WORKERS = 2
SECONDS = 5.0  # that one conversation may take; ordinary ones take milliseconds
MAX_BYTES = 1 << 30  # of a worker's address space, of which Python and jinja2 take about a tenth


class TooLongError(InvalidRequestError):
    """The rendered text has more characters than are allowed.

    Args:
      num_chars: those of the text.
    """

    def __init__(self, num_chars: int) -> None:
        super().__init__(f"the chat template gives {num_chars} characters")
        self.num_chars = num_chars


class Renderer:
    """Workers that render templates, one conversation each at a time. They start when they are first needed, and end with `close`."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._threads = Unjoined(NUM_WORKERS, thread_name_prefix="pjax-template")  # each waits for the worker that it has taken
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the next two
        self._workers: set[_Worker] = set()
        self._is_closed = False

    async def render(self, template: str, names: Mapping[str, Any], max_chars: int | None) -> str:
        """The text of a conversation.

        Raises InvalidRequestError when the template refuses it or goes beyond its limits, TooLongError when the text has more than
        `max_chars` characters, and ApiError 503 once this is closed.
        """
        if self._is_closed:
            raise _closed()
        rendering = asyncio.get_running_loop().run_in_executor(self._threads, self._render, template, names, max_chars)
        try:
            return await rendering
        except asyncio.CancelledError:  # either of this task, or of what `close` has dropped before its turn
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise _closed() from None

    def start(self) -> None:
        """Starts a first worker, in the background."""
        with contextlib.suppress(RuntimeError):
            self._threads.submit(lambda: self._idle.put(self._worker()))

    def close(self) -> None:
        """Ends all workers; what they render fails."""
        with self._lock:
            self._is_closed = True
            workers, self._workers = self._workers, set()
        self._threads.shutdown()
        for worker in workers:
            worker.end()

    def _worker(self) -> _Worker:
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        with self._lock:
            if self._is_closed:
                raise _closed()
            worker = _Worker(self.seconds)
            self._workers.add(worker)
            return worker

    def _render(self, template: str, names: Mapping[str, Any], max_chars: int | None) -> str:
        line = json.dumps({"template": template, "names": names, "max_chars": max_chars}).encode() + b"\n"
        worker = self._worker()
        answer = worker.ask(line)
        if answer is None:
            return self._replace(worker)
        self._idle.put(worker)
        if "error" in answer:
            raise InvalidRequestError(f"the chat template refuses these messages: {answer['error']}")
        if "num_chars" in answer:
            raise TooLongError(answer["num_chars"])
        return str(answer["text"])

    def _replace(self, worker: _Worker) -> str:
        """Raises what a worker that has ended is to tell; another takes its place when it is needed."""
        with self._lock:
            self._workers.discard(worker)
        status = worker.status()
        if self._is_closed:
            raise _closed()
        limit = f"{self.seconds:g} seconds" if status == -signal.SIGALRM else "its memory"
        raise InvalidRequestError(f"the chat template refuses these messages: it takes more than {limit}")


def _closed() -> ApiError:
    return ApiError(503, "the server is shutting down")


class _Worker:
    """One process. Its environment has none of the server's settings, which may hold keys."""

    def __init__(self, seconds: float) -> None:
        package = str(Path(__file__).resolve().parents[2])
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PJAX_")}
        paths = os.pathsep.join(filter(None, (package, kept.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pjax.text.template_worker", str(seconds), str(MAX_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
            start_new_session=True,  # Ctrl-C is the server's alone
        )

    def ask(self, line: bytes) -> dict[str, Any] | None:
        """The answer to a line; None when the process ends instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            return dict(json.loads(answer)) if answer.endswith(b"\n") else None
        except (OSError, ValueError):  # a pipe without a reader, or one that `end` has closed
            return None

    def status(self) -> int:
        """Waits for the end of a process that has closed its output; its status."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        return self.end()

    def end(self) -> int:
        """Ends the process if it has not ended; its status."""
        self._process.kill()
        status = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()
        return status
