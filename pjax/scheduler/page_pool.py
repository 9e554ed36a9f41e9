"""Page ids and how many owners each has. Knows nothing of requests or tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class PagePool:
    """Pages 0 .. num_pages - 1, each free or owned by one or more sequences (Kwon et al. 2023, section 4.2)."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}, but must be >= 1")
        self.num_pages = num_pages
        self._counts = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: page 0 comes first, warm pages again soon

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages with at least one owner, each counted once."""
        return self.num_pages - len(self._free)

    def can_allocate(self, count: int) -> bool:
        """Whether `allocate(count)` would succeed."""
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one owner each; MemoryError, and nothing taken, when there are fewer free."""
        if not self.can_allocate(count):
            raise MemoryError(f"{count} pages are wanted, but {len(self._free)} of {self.num_pages} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page_id in taken:
            self._counts[page_id] = 1
        return taken

    def fork(self, page_ids: Iterable[int]) -> None:
        """One more owner for each page; ValueError, and nothing changed, when a page is free."""
        page_ids = list(page_ids)
        for page_id in page_ids:
            self._require_owners(page_id, 1)
        for page_id in page_ids:
            self._counts[page_id] += 1

    def free(self, page_ids: Iterable[int]) -> None:
        """One owner less for each page; the last one's leave frees it. ValueError, and nothing changed, when one has too few."""
        page_ids = list(page_ids)
        for page_id, count in Counter(page_ids).items():
            self._require_owners(page_id, count)
        for page_id in page_ids:
            self._counts[page_id] -= 1
            if self._counts[page_id] == 0:
                self._free.append(page_id)

    def num_owners(self, page_id: int) -> int:
        """0 for a free page."""
        return self._counts[page_id]

    def _require_owners(self, page_id: int, count: int) -> None:
        if not 0 <= page_id < self.num_pages:
            raise ValueError(f"page {page_id} is not in [0, {self.num_pages})")
        if self._counts[page_id] < count:
            raise ValueError(f"page {page_id} has {self._counts[page_id] or 'no'} owner, but {count} are needed")

    def check(self) -> None:
        """Proves free + used = total; AssertionError with the pages that break it."""
        free = set(self._free)
        assert len(free) == len(self._free), f"pages free twice: {sorted(p for p in free if self._free.count(p) > 1)}"
        assert free <= set(range(self.num_pages)), f"pages that the pool does not have: {sorted(free - set(range(self.num_pages)))}"
        wrong = [p for p, count in enumerate(self._counts) if (count == 0) != (p in free) or count < 0]
        assert not wrong, f"pages neither free nor owned, or both: {wrong}"
