"""Page ids and how many owners each has. Knows nothing of requests or tokens."""

from __future__ import annotations

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
        """One more owner for each page; ValueError when a page is free."""
        for page_id in page_ids:
            self._require_owner(page_id)
            self._counts[page_id] += 1

    def free(self, page_ids: Iterable[int]) -> None:
        """One owner less for each page; the last one's leave frees it. ValueError when a page is free already."""
        for page_id in page_ids:
            self._require_owner(page_id)
            self._counts[page_id] -= 1
            if self._counts[page_id] == 0:
                self._free.append(page_id)

    def num_owners(self, page_id: int) -> int:
        """0 for a free page."""
        return self._counts[page_id]

    def _require_owner(self, page_id: int) -> None:
        if not 0 <= page_id < self.num_pages:
            raise ValueError(f"page {page_id} is not in [0, {self.num_pages})")
        if self._counts[page_id] == 0:
            raise ValueError(f"page {page_id} has no owner")

    def check(self) -> None:
        """Proves free + used = total; AssertionError with the pages that break it."""
        free = set(self._free)
        assert len(free) == len(self._free), f"pages free twice: {sorted(p for p in free if self._free.count(p) > 1)}"
        wrong = [p for p, count in enumerate(self._counts) if (count == 0) != (p in free) or count < 0]
        assert not wrong, f"pages neither free nor owned, or both: {wrong}"
