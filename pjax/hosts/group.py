"""The hosts of one instance once they have met: they agree on settings, hear rank 0's messages in their order, and end together.

    connect … all_here ─ agree … ─ ready ─ send / receive … ─ close          every host ends with status 0
                             any host lost, or failed                        every host ends with status 1 within seconds, saying why

A process may hang in a collective when another is lost. So its links' threads end it, whatever the main thread does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

from pjax.errors import ConfigError, EngineDeadError
from pjax.hosts.codec import Arrays, decode, encode
from pjax.hosts.link import LAST_WORDS, SERVING, Link
from pjax.hosts.place import Place

log = logging.getLogger(__name__)

REASON = 1.5  # seconds in which the loss of a host may explain why steps fail on another
GOODBYE = 5.0  # seconds for hosts to end in order
GRACE = 2.0  # seconds for rank 0 to tell clients that the instance has ended
MAX_SHOWN = 5


class Group:
    """This process's links: of rank 0 to every other rank, of the others to rank 0.

    `error` is why the instance ends; None while it does not. `ended` is set with it.
    """

    def __init__(self, place: Place) -> None:
        self.rank, self.size, self.place = place.rank, place.size, place
        self.error: str | None = None
        self.ended = threading.Event()
        self.on_leave: Callable[[str], None] = log.warning
        """Rank 0: called when another host was told to end."""
        self._links: dict[int, Link] = {}
        self._inbox: queue.SimpleQueue[tuple[int, str, dict[str, Any], Arrays]] = queue.SimpleQueue()
        self._lock = threading.RLock()  # telling the others may find one of them lost
        self._gathering = place.rank == 0  # a host that leaves before all are here may come again
        self._tell_clients: Callable[[str], None] | None = None
        self._announcing = False
        self._interrupt: BaseException | None = None
        self._closed = False
        self._byes: set[int] = set()
        self._all_gone = threading.Event()

    # ---- start

    def connect(self, rank: int, connection: Connection, address: str) -> None:
        """Adds the link to another rank, which hears from now on that this one lives. What one of its number said before is forgotten."""

        def take(data: bytes) -> None:
            self._take(rank, *decode(data))

        kept = [self._inbox.get() for _ in range(self._inbox.qsize())]
        for message in kept:
            if message[0] != rank:
                self._inbox.put(message)
        with self._lock:
            link = self._links[rank] = Link(connection, address, take, lambda why: self._lost(rank, why))
        link.start()

    def addresses(self) -> dict[int, str]:
        """Addresses of the ranks that are connected."""
        with self._lock:
            return {rank: link.address for rank, link in self._links.items()}

    def all_here(self) -> bool:
        """Whether every rank is connected; from then on the loss of one is the end of all."""
        with self._lock:
            self._gathering = self._gathering and len(self._links) < self.size - 1
            return not self._gathering

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Compares what every host says of itself, each thing by its name. ConfigError on every host that names who differs."""
        said = self._gather("facts", dict(facts))
        message = None if said is None else disagreement({rank: head for rank, (head, _) in said.items()})
        message = self._scatter({"message": message})["message"]
        if message is not None:
            raise ConfigError(message)

    def minimum(self, value: int) -> int:
        """The least of all hosts' values."""
        said = self._gather("value", {"value": value})
        return int(self._scatter({"value": said and min(head["value"] for head, _ in said.values())})["value"])

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every host."""
        return self._scatter({"value": value})["value"]

    def ready(self) -> None:
        """Waits until every host is here; from now on a host that is silent for a few seconds is lost."""
        self.agree({})
        for link in self._links.values():
            link.patience = SERVING

    def _gather(self, kind: str, head: dict[str, Any]) -> dict[int, tuple[dict[str, Any], Arrays]] | None:
        if self.rank:
            self.send(encode(kind, head))
            return None
        said: dict[int, tuple[dict[str, Any], Arrays]] = {0: (head, {})}
        while len(said) < self.size:
            rank, found, head, arrays = self._next()
            if found != kind or rank in said:
                raise EngineDeadError(f"rank {rank} said {found!r}, but must say {kind!r}")
            said[rank] = head, arrays
        return said

    def _scatter(self, head: dict[str, Any]) -> dict[str, Any]:
        if self.rank == 0:
            self.send(encode("verdict", head))
            return head
        _, kind, head, _ = self._next()
        if kind != "verdict":
            raise EngineDeadError(f"rank 0 said {kind!r}, but must say 'verdict'")
        return head

    def _next(self) -> tuple[int, str, dict[str, Any], Arrays]:
        found = self._inbox.get()
        if found[1] == "bye":
            raise EngineDeadError("rank 0 ended before the instance was ready")
        return found

    # ---- work

    def send(self, data: bytes) -> None:
        """From rank 0 to all others, or from another to rank 0. Returns at once; EngineDeadError when the instance ends."""
        if self.error is not None or self._closed:
            raise EngineDeadError(self.error or "the instance has ended")
        for link in self._links.values():
            link.send(data)

    @contextlib.contextmanager
    def announce(self, data: bytes) -> Iterator[None]:
        """Sends a message; rank 0 does inside what it says. No signal comes between the two: the others would wait for ever."""
        self._announcing = True
        try:
            self.send(data)
            yield
        finally:
            self._announcing = False
            if self._interrupt is not None:
                error, self._interrupt = self._interrupt, None
                raise error

    def interrupt(self, error: BaseException) -> None:
        """In the main thread's handler of a signal: raises, now or when what was announced has begun."""
        if not self._announcing:
            raise error
        self._interrupt = error

    def receive(self) -> tuple[str, dict[str, Any], Arrays]:
        """The next message of rank 0: kind, head and arrays; "bye" is the last."""
        return self._inbox.get()[1:]

    # ---- end

    def tell_clients_by(self, call: Callable[[str], None]) -> None:
        """Has this called with the reason, in a thread of its own, when the instance fails; the process lives for a moment then."""
        self._tell_clients = call

    def leave(self, why: str) -> None:
        """Asks rank 0 to end the instance in order."""
        with contextlib.suppress(EngineDeadError):
            self.send(encode("leave", {"message": f"rank {self.rank} at {self._own_address()} {why}"}))

    def fail(self, error: BaseException) -> EngineDeadError:
        """This host can't go on, and so none can. Gives what to raise: why the instance ends, if another host's loss is known by then."""
        own = f"rank {self.rank} failed: {type(error).__name__}: {error}"
        if self.rank and self.error is None and not self._closed:
            with contextlib.suppress(EngineDeadError):
                self.send(encode("failed", {"message": own}))
        # A lost host makes the steps of all others fail; its link says so at the same time.
        if not self.ended.wait(REASON if self.rank == 0 else 2 * REASON):
            self._end(own)
        return EngineDeadError(self.error or own)

    def refuse(self, error: BaseException) -> None:
        """This host can't start: ends the others. The error is the caller's to raise; whenever the process ends, its status is 1."""
        self.dismiss(f"rank {self.rank} can't start: {type(error).__name__}: {error}")

    def dismiss(self, message: str) -> None:
        """Ends the others, for this reason."""
        with self._lock:
            if self.error is not None or self._closed:
                return
            self.error = message
        self._tell_others(message)
        for link in self._links.values():
            link.close(1.0)

    def close(self) -> bool:
        """Rank 0: ends all hosts in order. The others: answers to that. True when every host has ended its work."""
        if self.error is not None:
            return False
        if self._closed:
            return True
        if self.rank == 0:
            with contextlib.suppress(EngineDeadError):
                self.send(encode("bye"))
            gone = self._all_gone.wait(GOODBYE)
            if not gone:
                self.error = f"{self.size - 1 - len(self._byes)} hosts did not end in {GOODBYE:g} seconds"
        else:
            gone = True
            self.send(encode("bye"))
        self._closed = True
        for link in self._links.values():
            link.close(1.0)
        return gone

    def _take(self, rank: int, kind: str, head: dict[str, Any], arrays: Arrays) -> None:
        """In the thread that reads a rank's messages."""
        if kind == "lost":
            self._end(head["message"])
        elif kind == "failed":
            _later(REASON, self._end, f"{head['message']} (at {self._links[rank].address})")
        elif kind == "leave":
            self.on_leave(head["message"])
        elif kind == "bye" and self.rank == 0:
            self._byes.add(rank)
            if len(self._byes) == self.size - 1:
                self._all_gone.set()
        else:
            if kind == "bye":  # the main thread may hang in a step that others did not begin
                _later(GOODBYE, self._end_with_rank_0)
            self._inbox.put((rank, kind, head, arrays))

    def _lost(self, rank: int, why: str) -> None:
        with self._lock:
            address = self._links[rank].address
            if self._gathering:
                del self._links[rank]
                log.warning("rank %d at %s has left (%s) before all hosts were here; it may come again", rank, address, why)
                return
        if rank not in self._byes and not self._closed:
            self._end(f"rank {rank} at {address} is lost: {why}")

    def _tell_others(self, message: str) -> None:
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.send(encode("lost", {"message": message}))

    def _end(self, message: str) -> None:
        """In any thread but the last: the first reason counts, and the process ends."""
        with self._lock:
            if self.error is not None or self._closed:
                return
            self.error = message
            self._tell_others(message)  # under the lock, for which `quit` in another thread waits
        log.error("rank %d of %d: %s", self.rank, self.size, message)
        self.ended.set()
        threading.Thread(target=self._last_words, args=(message,), name="pjax-end", daemon=True).start()

    def _last_words(self, message: str) -> None:
        until = time.monotonic() + 0.5  # for what is on its way to the others
        if self._tell_clients is not None:
            until += GRACE
            with contextlib.suppress(Exception):
                self._tell_clients(message)
        time.sleep(max(until - time.monotonic(), 0))
        self.quit()

    def quit(self) -> None:
        """Ends this process, once what was on its way to the others has left; status 1, and a last line that says why."""
        until = time.monotonic() + LAST_WORDS
        try:
            with self._lock:
                links = list(self._links.values())
            for link in links:
                link.close(max(until - time.monotonic(), 0))
        finally:  # whatever comes between, a signal say
            _exit(1, f"rank {self.rank} of {self.size} ends: {self.error}")

    def _end_with_rank_0(self) -> None:
        if not self._closed:  # a process that has ended its work as a host may have other work
            _exit(0, f"rank {self.rank} ends with rank 0")

    def _own_address(self) -> str:
        return os.uname().nodename


def disagreement(said: Mapping[int, Mapping[str, Any]]) -> str | None:
    """What hosts say differently from rank 0, in one line; None when nothing."""
    own, lines = said[0], []
    for rank, facts in sorted(said.items()):
        for name in [*own, *(name for name in facts if name not in own)]:
            ours, theirs = (repr_of(one[name]) if name in one else "none" for one in (own, facts))
            if ours != theirs:
                lines.append(f"rank {rank} has {name} {theirs}, rank 0 has {ours}")
    more = f"; {len(lines) - MAX_SHOWN} more" if len(lines) > MAX_SHOWN else ""
    return f"hosts disagree: {'; '.join(lines[:MAX_SHOWN])}{more}" if lines else None


def repr_of(value: Any) -> str:
    """As a message shows it: what came as JSON and what did not alike."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(repr_of, value))}]"
    return value if isinstance(value, str) and value else repr(value)


def _later(seconds: float, call: Callable[..., None], *arguments: Any) -> None:
    timer = threading.Timer(seconds, call, arguments)
    timer.daemon = True
    timer.start()


def _exit(status: int, message: str) -> None:
    """Ends the process now, from any thread; what was written is written out."""
    print(f"pjax: {message}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(status)
