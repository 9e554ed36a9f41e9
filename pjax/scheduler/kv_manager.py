"""Pages of the running requests: how many each needs, which it has, and the block tables that say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pjax.scheduler.page_pool import PagePool
from pjax.scheduler.request import Request
from pjax.scheduler.table import SequenceTable


class KVManager:
    """Position `i` of a request is slot `i % page_size` of page `block_tables[row, i // page_size]`."""

    def __init__(self, pool: PagePool, table: SequenceTable, page_size: int) -> None:
        self.pool = pool
        self.page_size = page_size
        self._table = table
        self._pages: dict[Request, list[int]] = {}

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens take."""
        return -(-num_tokens // self.page_size)

    def pages_of(self, request: Request) -> list[int]:
        """A request's pages, in the order of its positions."""
        return self._pages.get(request, [])

    def can_extend(self, request: Request, num_tokens: int) -> bool:
        """Whether `extend` would succeed."""
        return self.pool.can_allocate(self.num_pages_for(num_tokens) - len(self.pages_of(request)))

    def extend(self, request: Request, num_tokens: int) -> None:
        """Gives a running request the pages of positions `[0, num_tokens)`; MemoryError when there are too few."""
        pages = self._pages.setdefault(request, [])
        missing = self.num_pages_for(num_tokens) - len(pages)
        if missing <= 0:
            return
        new = self.pool.allocate(missing)
        self._table.block_tables[request.row, len(pages) : len(pages) + missing] = new
        pages.extend(new)

    def release(self, request: Request) -> None:
        """Frees all its pages, last one first, so that its first pages are reused first."""
        self.pool.free(reversed(self._pages.pop(request, [])))

    def check(self, running: Iterable[Request]) -> None:
        """Proves that every used page is in exactly as many block tables as it has owners."""
        self.pool.check()
        running = set(running)
        assert set(self._pages) <= running, "a request that does not run owns pages"
        owners = Counter(page_id for pages in self._pages.values() for page_id in pages)
        assert len(owners) == self.pool.num_used, f"{self.pool.num_used} pages are used, but {len(owners)} are owned"
        for request, pages in self._pages.items():
            assert len(pages) >= self.num_pages_for(request.num_computed), f"request {request.request_id!r} lacks pages"
            assert self._table.block_tables[request.row, : len(pages)].tolist() == pages
        assert all(self.pool.num_owners(page_id) == count for page_id, count in owners.items())
