"""Renders chat templates in a process of its own: `python -m pjax.text.template_worker SECONDS BYTES`.

A template is a program, and a thread cannot be stopped, least of all inside one operation of jinja2 that builds a long text. The
system stops this process instead: an alarm after so many seconds of one conversation, and a limit of its memory. It reads a JSON
object a line, {"template", "names", "max_chars"}, and answers with {"text"}, {"num_chars"} of a text that is too long, or {"error"}.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from typing import Any

from pjax.text.chat_template import render

MAX_ERROR = 500  # characters of an error that are passed on


def main(seconds: float, max_bytes: int) -> None:
    """Answers until its input ends."""
    _limit_memory(max_bytes)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # both as the one who started this may have left them
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    while line := sys.stdin.buffer.readline():
        signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the process, whatever runs
        answer = json.dumps(_answer(line)).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


def _limit_memory(max_bytes: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system has such a limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))


def _answer(line: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(line)
        text = render(asked["template"], asked["names"])
    except Exception as error:  # the template is code: given a message that it does not expect, it raises anything
        return {"error": str(error)[:MAX_ERROR] or type(error).__name__}
    limit = asked["max_chars"]
    return {"text": text} if limit is None or len(text) <= limit else {"num_chars": len(text)}


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
