"""Who waits and who runs, each in the order in which they are served."""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left
from collections.abc import Iterator
from operator import attrgetter

from pjax.scheduler.request import Request

Rank = tuple[float, int]
_rank = attrgetter("rank")


class WaitingQueue:
    """Requests by rank, on a heap. Adding, taking the first and removing any one cost O(log n)."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, int, Request]] = []
        self._serials: dict[Request, int] = {}  # of those that wait; an entry of another serial is dead
        self._next = itertools.count()

    def __len__(self) -> int:
        return len(self._serials)

    def __iter__(self) -> Iterator[Request]:
        """All of them in order; sorts."""
        return iter(sorted(self._serials, key=_rank))

    @property
    def first(self) -> Request:
        """The one that is served next; IndexError when nobody waits."""
        self._drop_dead()
        return self._heap[0][2]

    def add(self, request: Request) -> None:
        """Places a request, new or preempted, by its rank."""
        assert request not in self._serials
        serial = next(self._next)
        self._serials[request] = serial
        heapq.heappush(self._heap, (request.rank, serial, request))

    def pop(self) -> Request:
        """Takes out the first."""
        request = self.first
        heapq.heappop(self._heap)
        del self._serials[request]
        return request

    def remove(self, request: Request) -> None:
        """Takes out any one; KeyError when it does not wait."""
        del self._serials[request]
        if len(self._heap) > 2 * len(self._serials) + 64:  # mostly dead: cleared at a constant cost for each removal
            self._heap = [entry for entry in self._heap if self._serials.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def _drop_dead(self) -> None:
        heap, serials = self._heap, self._serials
        while heap and serials.get(heap[0][2]) != heap[0][1]:
            heapq.heappop(heap)


class RunningQueue:
    """Requests by rank, in a list: a step reads them all, few come and go."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def last(self) -> Request:
        """The first to be preempted; IndexError when nobody runs."""
        return self._requests[-1]

    def add(self, request: Request) -> None:
        """Places a request by its rank."""
        self._requests.insert(bisect_left(self._requests, request.rank, key=_rank), request)

    def remove(self, request: Request) -> None:
        """Takes one out; ValueError when it does not run."""
        index = bisect_left(self._requests, request.rank, key=_rank)
        if index == len(self._requests) or self._requests[index] is not request:
            raise ValueError(f"request {request.request_id!r} does not run")
        del self._requests[index]
