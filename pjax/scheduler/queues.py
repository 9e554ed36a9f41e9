"""Who waits and who runs, each in the order in which they are served."""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left
from collections.abc import Hashable, Iterator
from operator import attrgetter
from typing import Any, Generic, TypeVar

from pjax.scheduler.request import Request

T = TypeVar("T", bound=Hashable)
_rank = attrgetter("rank")


class RemovableHeap(Generic[T]):
    """Items by key, the smallest first, of equal keys the one added first. Adding, taking the first and removing any cost O(log n)."""

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, T]] = []
        self._serials: dict[T, int] = {}  # of the items that are in; an entry of another serial is dead
        self._next = itertools.count()

    def __len__(self) -> int:
        return len(self._serials)

    def __contains__(self, item: T) -> bool:
        return item in self._serials

    def __iter__(self) -> Iterator[T]:
        """All items in no order."""
        return iter(self._serials)

    @property
    def first(self) -> T:
        """The item of the smallest key; IndexError when there is none."""
        return self._first_entry()[2]

    @property
    def smallest(self) -> Any:
        """The smallest key; IndexError when there is none."""
        return self._first_entry()[0]

    def _first_entry(self) -> tuple[Any, int, T]:
        heap, serials = self._heap, self._serials
        while serials.get(heap[0][2]) != heap[0][1]:
            heapq.heappop(heap)
        return heap[0]

    def add(self, item: T, key: Any) -> None:
        """Puts an item in; ValueError when it is in already."""
        if item in self._serials:
            raise ValueError(f"{item!r} is in already")
        serial = next(self._next)
        self._serials[item] = serial
        heapq.heappush(self._heap, (key, serial, item))

    def pop(self) -> T:
        """Takes out the first."""
        item = self.first
        heapq.heappop(self._heap)
        del self._serials[item]
        return item

    def remove(self, item: T) -> None:
        """Takes out any item; KeyError when it is not in."""
        del self._serials[item]
        if len(self._heap) > 2 * len(self._serials) + 64:  # mostly dead: cleared at a constant cost for each removal
            self._heap = [entry for entry in self._heap if self._serials.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)


class WaitingQueue(RemovableHeap[Request]):
    """Requests by rank. Those that had at most so many tokens when they came are also in `short`."""

    def __init__(self, most_short: int) -> None:
        super().__init__()
        self.short: RemovableHeap[Request] = RemovableHeap()
        self.num_short_tokens = 0  # of all in `short`
        self._most_short = most_short
        self._sizes: dict[Request, int] = {}

    def enqueue(self, request: Request) -> None:
        """Places a request, new or preempted."""
        self.add(request, request.rank)
        if request.num_tokens <= self._most_short:
            self.short.add(request, request.rank)
            self._sizes[request] = request.num_tokens
            self.num_short_tokens += request.num_tokens

    def remove(self, item: Request) -> None:
        """Takes one out; KeyError when it does not wait."""
        super().remove(item)
        if item in self.short:
            self.short.remove(item)
            self.num_short_tokens -= self._sizes.pop(item)

    def ordered(self) -> list[Request]:
        """All of them in order; sorts."""
        return sorted(self, key=_rank)


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
