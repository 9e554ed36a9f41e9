"""Pages of the running requests: how many each needs, which it has, and the block tables that say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from pjax.kv_cache.page_pool import PagePool
from pjax.kv_cache.prefix import page_keys
from pjax.kv_cache.sequence import PRIVATE, Sequence
from pjax.kv_cache.swap_space import SwapSpace


class KVManager:
    """Position `i` of a request is slot `i % page_size` of page `block_tables[row, i // page_size]`."""

    def __init__(
        self, pool: PagePool, block_tables: npt.NDArray[np.int32], page_size: int, swap: SwapSpace, *, enable_prefix_caching: bool = True
    ) -> None:
        self.pool = pool
        self.swap = swap
        self.enable_prefix_caching = enable_prefix_caching
        self.page_size = page_size
        self.epoch = 0
        """Number of the weights that steps run with; part of every page's key."""
        self._block_tables = block_tables
        self._copies: dict[Sequence, tuple[int, int]] = {}  # pages that the coming step copies: from, to
        self._pages: dict[Sequence, list[int]] = {}
        self._num_remembered: dict[Sequence, int] = {}  # its first pages that are found again, or whose equals are

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens take."""
        return -(-num_tokens // self.page_size)

    def pages_of(self, request: Sequence) -> list[int]:
        """A request's pages, in the order of its positions."""
        return self._pages.get(request, [])

    def extend(self, request: Sequence, num_tokens: int) -> bool:
        """Gives a running request the pages of positions `[0, num_tokens)`, those from `num_computed` on for itself alone.

        A page that it would write and shares with others is replaced, and copied by the coming step (Kwon et al. 2023,
        section 4.4). Such a page is partly filled: full ones are never written. False, and nothing taken, when too few are free.
        """
        pages = self._pages[request]
        index, offset = divmod(request.num_computed, self.page_size)
        if num_tokens <= len(pages) * self.page_size and (offset == 0 or self.pool.num_owners(pages[index]) == 1):
            return True  # nearly always
        copies = offset > 0 and self.pool.num_owners(pages[index]) > 1
        missing = max(-(-num_tokens // self.page_size) - len(pages), 0)
        if not self.pool.can_allocate(missing + copies):
            return False
        new = self.pool.allocate(missing + copies)
        blocks = self._block_tables[request.row]
        if copies:
            source, target = pages[index], new.pop()
            pages[index] = blocks[index] = target
            self._copies[request] = source, target
            self.pool.free([source])
        blocks[len(pages) : len(pages) + missing] = new
        pages.extend(new)
        return True

    def take_copies(self) -> list[tuple[int, int]]:
        """The copies that `extend` has promised, in their order, each told once.

        No copy reads what an earlier one has written; one may write what an earlier one has read.
        """
        copies = list(self._copies.values())
        self._copies.clear()
        return copies

    def fork(self, request: Sequence, other: Sequence) -> None:
        """Gives another running request, which has no pages, all pages of this one and their tokens."""
        pages = self._pages[request]
        self.pool.fork(pages)
        self._pages[other] = list(pages)
        self._num_remembered[other] = self._num_remembered[request]
        self._block_tables[other.row, : len(pages)] = pages
        other.num_computed = request.num_computed
        other.page_keys, other.epoch = list(request.page_keys), request.epoch

    def find_cached(self, request: Sequence) -> list[int]:
        """Pages that hold its first tokens already; never of all its tokens, since the last one's logits are to be computed.

        None where the prompt's log-probabilities are wanted, for they are computed with it.
        Whole pages only: where the last page is cached too, it is computed again into a page of the request's own.
        """
        if request.epoch != self.epoch and not self.swap.num_tokens(request):
            request.epoch, request.page_keys = self.epoch, []  # all its tokens are computed with the newest weights
        if not self.enable_prefix_caching or request.scores_prompt or request.epoch == PRIVATE:
            return []
        found = []
        limit = (request.num_tokens - 1) // self.page_size
        for key in page_keys(request, self.page_size, limit)[:limit]:
            page_id = self.pool.find(key)
            if page_id is None:
                break
            found.append(page_id)
        return found

    def can_start(self, cached: list[int], num_tokens: int, *, more: int = 0) -> bool:
        """Whether `start` with these cached pages and then `extend` to `num_tokens` would succeed and leave `more` pages."""
        kept = sum(self.pool.num_owners(page_id) == 0 for page_id in cached)
        return self.pool.can_allocate(self.num_pages_for(num_tokens) - len(cached) + kept + more)

    def start(self, request: Sequence, cached: list[int]) -> None:
        """Gives a running request its cached pages, and behind them what is saved of it; their tokens are computed."""
        self.pool.reuse(cached)
        pages = self._pages[request] = list(cached)
        self._num_remembered[request] = len(cached)
        request.num_computed = len(cached) * self.page_size
        num_saved = self.swap.num_tokens(request)
        if num_saved > request.num_computed:
            pages += self.pool.allocate(self.num_pages_for(num_saved) - len(cached))
            self.swap.restore(request, len(cached), pages[len(cached) :])
            request.num_computed = num_saved
        else:
            self.swap.drop(request)
        self._block_tables[request.row, : len(pages)] = pages

    def save(self, request: Sequence) -> bool:
        """Has a running request's computed pages copied to host memory before the coming step, if that pays."""
        num_tokens = min(request.num_computed, request.num_tokens)
        pages = self._pages[request][: self.num_pages_for(num_tokens)]
        if request in self._copies:  # promised to this very step, which will not make it: the contents are still in the source
            source, target = self._copies[request]
            pages[pages.index(target)] = source
        num_shared = next((i for i, page_id in enumerate(pages) if self.pool.num_owners(page_id) < 2), len(pages))
        return self.swap.save(request, pages, num_tokens, num_shared if self.enable_prefix_caching else 0)

    def remember(self, request: Sequence, num_tokens: int) -> None:
        """Lets others find the full pages of positions `[0, num_tokens)`, which the coming step has computed.

        A row of the same step may read them: each layer writes the keys and values of all rows before any row attends.
        """
        count = num_tokens // self.page_size
        known = self._num_remembered[request]
        if count <= known or not self.enable_prefix_caching or request.epoch == PRIVATE:
            return
        keys, pages = page_keys(request, self.page_size, count), self._pages[request]
        for index in range(known, count):
            self.pool.remember(pages[index], keys[index])
        self._num_remembered[request] = count

    def begin_epoch(self) -> None:
        """Steps run with other weights from now on: nobody finds a page of before, nor what running requests add to theirs.

        What is saved of preempted requests is dropped; they are computed again.
        """
        self.epoch += 1
        self.pool.forget()
        self.swap.forget()
        for request in self._pages:
            request.epoch, request.page_keys = PRIVATE, []

    def distrust(self, request: Sequence) -> None:
        """Nobody finds the pages that a request has, or had, to itself any more: they may hold NaN. Those that others share stay theirs."""
        for pool in (self.pool, self.swap.pool):
            for page_id in [] if pool is None else map(pool.find, request.page_keys):
                if page_id is not None and pool is not None and pool.num_owners(page_id) <= 1:
                    pool.unname(page_id)
        request.epoch, request.page_keys = PRIVATE, []

    def release(self, request: Sequence) -> None:
        """Frees all its pages, last one first: of cached pages the end of a prompt is evicted before its beginning."""
        self.pool.free(reversed(self._pages.pop(request, [])))
        self._num_remembered.pop(request, None)
        self._copies.pop(request, None)

    def check(self, running: Iterable[Sequence]) -> None:
        """Proves that every used page is in exactly as many block tables as it has owners."""
        self.pool.check()
        running = set(running)
        assert set(self._pages) <= running, "a request that does not run owns pages"
        owners = Counter(page_id for pages in self._pages.values() for page_id in pages)
        assert len(owners) == self.pool.num_used, f"{self.pool.num_used} pages are used, but {len(owners)} are owned"
        for request, pages in self._pages.items():
            assert len(pages) >= self.num_pages_for(request.num_computed), f"request {request.request_id!r} lacks pages"
            assert self._block_tables[request.row, : len(pages)].tolist() == pages
        assert all(self.pool.num_owners(page_id) == count for page_id, count in owners.items())
