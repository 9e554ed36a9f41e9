"""Ctrl-C at a time of our own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defers Ctrl-C to the end of the block, where it raises KeyboardInterrupt as always.

    Only the main thread is interrupted by Ctrl-C, and only where Python's own handler is installed: elsewhere it does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    was_pressed = False

    def note(*_: object) -> None:
        nonlocal was_pressed
        was_pressed = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if was_pressed:
            signal.raise_signal(signal.SIGINT)
