"""One connection between two hosts: a thread reads, a thread writes, and either end notices within seconds when the other is gone."""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

BEAT = 1.0  # seconds after which an end that has nothing to say says so
STARTING, SERVING = 60.0, 5.0  # seconds of silence that are a loss: while models load, Python may be busy for long
MAX_WAITING = 256  # messages; a host is never more than a few steps behind, since every step waits for all of them
MAX_BYTES = 64 << 20  # of one message
STUCK = 10  # seconds that a message which has begun may take
LAST_WORDS = 1.0  # seconds in which what was on its way still leaves, or is read


def secure(sock: socket.socket, key: bytes, *, listening: bool) -> Connection:
    """A connection whose other end has shown that it has the key, as this end has. OSError, EOFError or AuthenticationError if not."""
    sock.setblocking(True)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    limit = struct.pack("ll", STUCK, 0)  # reads and writes that take longer are errors
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    connection = Connection(sock.detach())
    try:
        for turn in (deliver_challenge, answer_challenge) if listening else (answer_challenge, deliver_challenge):
            turn(connection, key)
    except (OSError, EOFError, AuthenticationError, ValueError, AssertionError):
        connection.close()
        raise
    return connection


class Link:
    """A connection with its two threads.

    Args:
      on_message: called in the reading thread with each message.
      on_lost: called once, from either thread, with what is known of why.
    """

    def __init__(self, connection: Connection, address: str, on_message: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        self.address = address
        self.patience = STARTING
        self._connection = connection
        self._on_message, self._on_lost = on_message, on_lost
        self._queue: queue.Queue[bytes | None] = queue.Queue(MAX_WAITING)
        self._ended = False
        self._threads = [threading.Thread(target=run, name="pjax-host", daemon=True) for run in (self._read, self._write)]

    def start(self) -> None:
        """Starts both threads."""
        for thread in self._threads:
            thread.start()

    def send(self, data: bytes) -> None:
        """Puts a message on its way and returns at once. A host that takes none of so many is lost."""
        try:
            self._queue.put_nowait(data)
        except queue.Full:
            self._lose(f"it has not taken {MAX_WAITING} messages")

    def close(self, seconds: float) -> None:
        """Sends what is waiting, for so long, and closes; what comes is not read any more."""
        self._ended = True
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._threads[1].join(seconds)

    def _lose(self, why: str) -> None:
        if not self._ended:
            self._ended = True
            self._on_lost(why)

    def _read(self) -> None:
        # Silence is counted in looks, not by the clock: a process that was itself stopped for a minute has looked once.
        silent = 0
        try:
            while not self._ended:
                if self._connection.poll(BEAT):
                    silent = 0
                    if data := self._connection.recv_bytes(MAX_BYTES):
                        self._on_message(data)
                elif (silent := silent + 1) * BEAT > self.patience:
                    return self._lose(f"it has said nothing for {silent * BEAT:.0f} seconds")
        except (OSError, EOFError) as error:
            self._lose(f"its connection broke ({str(error) or 'closed by the other end'})")
        except Exception as error:
            self._lose(f"it sent what can't be read: {type(error).__name__}: {error}")

    def _write(self) -> None:
        while True:
            try:
                data = self._queue.get(timeout=BEAT)
            except queue.Empty:
                data = b""
            if data is None:
                break
            try:
                self._connection.send_bytes(data)
            except (OSError, ValueError) as error:
                self._threads[0].join(LAST_WORDS)  # what the other end said before it went, perhaps why, comes first
                return self._lose(f"its connection broke ({error})")
