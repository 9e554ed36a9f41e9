"""Page ids, how many owners each has, and which hold what somebody may ask for again. Knows nothing of requests or tokens."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(slots=True, eq=False)
class PageRun:
    """Pages of one sequence in one group of layers: those with the indices `first`, `first + 1`, … of the sequence.

    Pages before `first` were passed by the group's window, and belong to the sequence no more.
    """

    ids: list[int]
    first: int = 0

    @property
    def end(self) -> int:
        """Index of the page after the last one."""
        return self.first + len(self.ids)


class PagePool:
    """Pages 0 .. num_pages - 1, each free or owned by one or more sequences (Kwon et al. 2023, section 4.2).

    The first `num_reserved` of them nobody gets.

    A page may be given a key that names its contents. A free page with a key keeps both until it is evicted: when no
    page without a key is free, the one that has been free for longest goes first. Every call takes constant time a page.
    """

    def __init__(self, num_pages: int, num_reserved: int = 0) -> None:
        if num_pages <= num_reserved:
            raise ValueError(f"num_pages is {num_pages}, but must be >= {num_reserved + 1}")
        self.num_pages = num_pages
        self.num_usable = num_pages - num_reserved
        """Pages that sequences can have."""
        self._counts = [0] * num_pages
        self._free = list(range(num_pages - 1, num_reserved - 1, -1))  # a stack: the lowest comes first, warm pages again soon
        self._kept: OrderedDict[int, None] = OrderedDict()  # free pages with a key, the least recently used first
        self._keys: list[Hashable | None] = [None] * num_pages
        self._by_key: dict[Hashable, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody owns, kept ones included."""
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Pages with at least one owner, each counted once."""
        return self.num_usable - self.num_free

    def can_allocate(self, count: int) -> bool:
        """Whether `allocate(count)` would succeed."""
        return count <= self.num_free

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one owner each; MemoryError, and nothing taken, when there are fewer free."""
        if not self.can_allocate(count):
            raise MemoryError(f"{count} pages are wanted, but {self.num_free} of {self.num_usable} are free")
        taken = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page_id in taken:
            self._counts[page_id] = 1
        return taken

    def _evict(self) -> int:
        page_id, _ = self._kept.popitem(last=False)
        self._drop_key(page_id)
        return page_id

    def _drop_key(self, page_id: int) -> None:
        del self._by_key[self._keys[page_id]]
        self._keys[page_id] = None

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
        counts, keys = self._counts, self._keys
        if len(set(page_ids)) < len(page_ids) or any(not 0 <= p < self.num_pages or counts[p] < 1 for p in page_ids):
            for page_id, count in Counter(page_ids).items():
                self._require_owners(page_id, count)
        for page_id in page_ids:
            counts[page_id] -= 1
            if counts[page_id] == 0:
                if keys[page_id] is None:
                    self._free.append(page_id)
                else:
                    self._kept[page_id] = None

    def num_owners(self, page_id: int) -> int:
        """0 for a free page."""
        return self._counts[page_id]

    def owners(self) -> npt.NDArray[np.uint8]:
        """[num_usable]: owners of each page that is not reserved, at most 255. Any thread may call it."""
        return np.minimum(np.array(self._counts[self.num_pages - self.num_usable :]), 255).astype(np.uint8)

    def keyed(self) -> npt.NDArray[np.bool_]:
        """[num_usable]: which have a key; those of them that are free are kept. Any thread may call it."""
        return np.array([key is not None for key in self._keys[self.num_pages - self.num_usable :]])

    @property
    def num_kept(self) -> int:
        """Free pages with a key."""
        return len(self._kept)

    # ---- pages that are found again

    def remember(self, page_id: int, key: Hashable) -> None:
        """Names what an owned page holds. A key that another page has already stays with that one."""
        self._require_owners(page_id, 1)
        if self._keys[page_id] is None and key not in self._by_key:
            self._keys[page_id] = key
            self._by_key[key] = page_id

    def unname(self, page_id: int) -> None:
        """Takes a page's key away, if it has one; a free page is then no longer kept."""
        if self._keys[page_id] is None:
            return
        self._drop_key(page_id)
        if page_id in self._kept:
            del self._kept[page_id]
            self._free.append(page_id)

    def find(self, key: Hashable) -> int | None:
        """The page that holds what `key` names, owned or free."""
        return self._by_key.get(key)

    def reuse(self, page_ids: Iterable[int]) -> None:
        """One more owner for each page, as `fork`, but pages that are free and kept will do."""
        page_ids = list(page_ids)
        for page_id in page_ids:
            if page_id not in self._kept:
                self._require_owners(page_id, 1)
        for page_id in page_ids:
            self._kept.pop(page_id, None)
            self._counts[page_id] += 1

    def forget(self) -> None:
        """Takes every key away: the contents are lost, or not to be relied on."""
        self._free.extend(self._kept)
        self._kept.clear()
        self._by_key.clear()
        self._keys = [None] * self.num_pages

    def _require_owners(self, page_id: int, count: int) -> None:
        if not 0 <= page_id < self.num_pages:
            raise ValueError(f"page {page_id} is not in [0, {self.num_pages})")
        if self._counts[page_id] < count:
            raise ValueError(f"page {page_id} has {self._counts[page_id] or 'no'} owner, but {count} are needed")

    def check(self) -> None:
        """Proves free + used = total; AssertionError with the pages that break it."""
        listed = [*self._free, *self._kept]
        free = set(listed)
        assert len(free) == len(listed), f"pages free twice: {sorted(p for p in free if listed.count(p) > 1)}"
        assert free <= set(range(self.num_pages)), f"pages that the pool does not have: {sorted(free - set(range(self.num_pages)))}"
        usable = range(self.num_pages - self.num_usable, self.num_pages)
        assert free <= set(usable), f"reserved pages are free: {sorted(free - set(usable))}"
        wrong = [p for p in usable if (self._counts[p] == 0) != (p in free) or self._counts[p] < 0]
        assert not wrong, f"pages neither free nor owned, or both: {wrong}"
        keyed = {key: page_id for page_id, key in enumerate(self._keys) if key is not None}
        assert keyed == self._by_key, f"keys of pages {keyed}, but pages of keys {self._by_key}"
        assert all(self._keys[p] is not None for p in self._kept), "a page is kept without a key"
        assert all(self._keys[p] is None for p in self._free), "a page with a key is free, but not kept"
