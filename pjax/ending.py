"""How a process of pjax ends in time, with the right status, whatever its threads still do.

An interpreter that ends waits for the threads of `concurrent.futures`, and so for a compilation of minutes; a thread that comes back
from native code after that can crash the process.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import NoReturn


def end_now(status: int) -> NoReturn:
    """Ends the process, from any thread, once what was written is written out. Nothing is waited for, and no exit handler runs."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def end_within(seconds: float, status: int) -> None:
    """Ends the process after so many seconds, if it has not ended by itself; returns at once. Call it last."""

    def end() -> None:
        time.sleep(seconds)
        end_now(status)

    threading.Thread(target=end, name="pjax-end", daemon=True).start()
