"""Pages of the running sequences: how many each needs, which it has, and the block tables that say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

from pjax.kv_cache.block_tables import BlockTables
from pjax.kv_cache.layout import NULL_PAGE, KVCacheGroup, KVCacheLayout
from pjax.kv_cache.page_pool import PagePool, PageRun
from pjax.kv_cache.prefix import group_key, page_keys
from pjax.kv_cache.sequence import PRIVATE, CachedSequence
from pjax.kv_cache.swap_space import SwapSpace


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What the pool holds already of a sequence's first tokens."""

    num_tokens: int
    runs: tuple[PageRun, ...]
    """By group: all pages of those tokens, or, where the group has a window, those that the next token to be computed sees."""


@dataclass(slots=True)
class _Held:
    """What a running sequence has."""

    runs: list[PageRun]  # by group; all end at the same index
    num_named: int  # pages from the first on whose keys the pool has: of these pages, or of others with the same contents


class KVManager:
    """Position `i` of a sequence is slot `i % page_size` of page `block_tables.ids[group, row, i // page_size]`.

    Args:
      max_step_tokens: tokens of one sequence that a step computes at most.
    """

    def __init__(
        self,
        pool: PagePool,
        block_tables: BlockTables,
        page_size: int,
        swap: SwapSpace,
        layout: KVCacheLayout,
        max_step_tokens: int,
        *,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.pool = pool
        self.swap = swap
        self.layout = layout
        self.enable_prefix_caching = enable_prefix_caching
        self.page_size = page_size
        self.epoch = 0
        """Number of the weights that steps run with; part of every page's key."""
        self._block_tables = block_tables
        self._max_step_tokens = max_step_tokens
        self._windows = [(number, group) for number, group in enumerate(layout.groups) if group.sliding_window is not None]
        self._copies: dict[CachedSequence, list[tuple[int, int]]] = {}  # pages that the coming step copies: from, to
        self._held: dict[CachedSequence, _Held] = {}

    @property
    def num_groups(self) -> int:
        """Number of groups of layers, each of which has its own page for the same positions."""
        return len(self.layout.groups)

    def num_pages_for(self, num_tokens: int) -> int:
        """Returns the pages that a sequence of `num_tokens` tokens has at most at one time, over all groups."""
        return self.layout.num_pages_for(num_tokens, self.page_size, self._max_step_tokens)

    def pages_of(self, sequence: CachedSequence, group: int = 0) -> list[int]:
        """Returns a sequence's pages in a group, in the order of its positions; not those that a window has passed."""
        held = self._held.get(sequence)
        return [] if held is None else held.runs[group].ids

    def extend(self, sequence: CachedSequence, num_tokens: int) -> bool:
        """Gives a running sequence the pages of positions `[0, num_tokens)`, those from `num_computed` on for itself alone.

        Pages that a window has passed are freed first. A page that it would write and shares with others is replaced, and copied
        by the coming step (Kwon et al. 2023, section 4.4). Such a page is partly filled: full ones are never written. Returns
        False, with no page taken, when too few are free.
        """
        held = self._held[sequence]
        if self._windows:
            self._free_passed(sequence, held)
        index, offset = divmod(sequence.num_computed, self.page_size)
        end = held.runs[0].end
        shared = [run for run in held.runs if self.pool.num_owners(run.ids[index - run.first]) > 1] if offset else []
        missing = max(-(-num_tokens // self.page_size) - end, 0)
        if not missing and not shared:
            return True  # nearly always
        wanted = missing * len(held.runs) + len(shared)
        if not self.pool.can_allocate(wanted):
            return False
        new = iter(self.pool.allocate(wanted))
        for group, run in enumerate(held.runs):
            if run in shared:
                source, target = run.ids[index - run.first], next(new)
                run.ids[index - run.first] = target
                self._block_tables.write(group, sequence.row, index, [target])
                self._copies.setdefault(sequence, []).append((source, target))
                self.pool.free([source])
            added = [next(new) for _ in range(missing)]
            self._block_tables.write(group, sequence.row, end, added)
            run.ids += added
        return True

    def _free_passed(self, sequence: CachedSequence, held: _Held) -> None:
        """Frees the pages that no token from the next known one on sees. A step under way may still read them: the next one, which may
        write them, runs after it."""
        num_computed = self._num_known(sequence)
        for number, group in self._windows:
            run = held.runs[number]
            count = group.first_needed(num_computed) // self.page_size - run.first
            if count > 0:
                passed, run.ids = run.ids[:count], run.ids[count:]
                self._block_tables.write(number, sequence.row, run.first, [NULL_PAGE] * count)
                run.first += count
                self.pool.free(passed)

    def _num_known(self, sequence: CachedSequence) -> int:
        """Returns how many of its tokens are computed and known, so that it may be continued from there."""
        return min(sequence.num_computed, sequence.num_tokens)

    def take_copies(self) -> list[tuple[int, int]]:
        """Returns the copies that `extend` has promised, in their order, each once.

        No copy reads what an earlier one has written; one may write what an earlier one has read.
        """
        copies = [copy for copies in self._copies.values() for copy in copies]
        self._copies.clear()
        return copies

    def fork(self, sequence: CachedSequence, other: CachedSequence) -> None:
        """Gives another running sequence, which has no pages, all pages of this one and their tokens."""
        held = self._held[sequence]
        self.pool.fork(page_id for run in held.runs for page_id in run.ids)
        self._held[other] = _Held([PageRun(list(run.ids), run.first) for run in held.runs], held.num_named)
        self._write_tables(other)
        other.num_computed = sequence.num_computed
        other.page_keys, other.epoch = list(sequence.page_keys), sequence.epoch

    def _write_tables(self, sequence: CachedSequence) -> None:
        """Writes all pages of a sequence that is new in its row."""
        for group, run in enumerate(self._held[sequence].runs):
            self._block_tables.write(group, sequence.row, 0, [NULL_PAGE] * run.first + run.ids)

    # ---- prefixes that are cached

    def find_cached(self, sequence: CachedSequence) -> CachedPrefix:
        """Returns the pages that hold its first tokens already; never of all its tokens, since the last one's logits are to be computed.

        None where the prompt's log-probabilities are wanted, for they are computed with it.
        Whole pages only: where the last page is cached too, it is computed again into a page of the sequence's own.
        """
        if sequence.epoch != self.epoch and not self.swap.num_tokens(sequence):
            sequence.epoch, sequence.page_keys = self.epoch, []  # all its tokens are computed with the newest weights
        if not self.enable_prefix_caching or sequence.scores_prompt or sequence.epoch == PRIVATE:
            return CachedPrefix(0, tuple(PageRun([]) for _ in self.layout.groups))
        limit = (sequence.num_tokens - 1) // self.page_size
        keys = page_keys(sequence, self.page_size, limit)
        count, runs = limit, list[PageRun]()
        while len(runs) < self.num_groups:  # each group may shorten what those before it have found
            group = len(runs)
            found = self._find_in_group(keys, count, group)
            if found.end < count and group > 0:
                count, runs = found.end, []
            else:
                count = found.end
                runs.append(found)
        num_tokens = count * self.page_size
        # What is saved in host memory may reach further, so that windows have passed some of these pages.
        num_computed = max(num_tokens, self.swap.num_tokens(sequence))
        return CachedPrefix(num_tokens, tuple(map(partial(self._without_passed, num_computed), self.layout.groups, runs)))

    def _without_passed(self, num_computed: int, group: KVCacheGroup, run: PageRun) -> PageRun:
        """Returns the pages of a run that tokens from position `num_computed` on see."""
        count = min(max(self._first_page(group, num_computed) - run.first, 0), len(run.ids))
        return PageRun(run.ids[count:], run.first + count)

    def _find_in_group(self, keys: list[bytes], limit: int, number: int) -> PageRun:
        """Returns the pages of the longest prefix that a group can go on from: at most `limit` pages, and all that the next token sees."""
        group, find = self.layout.groups[number], self.pool.find
        if group.sliding_window is None:
            found = []
            for key in keys[:limit]:
                if (page_id := find(group_key(key, number))) is None:
                    break
                found.append(page_id)
            return PageRun(found)
        end, tail = limit, list[int]()  # pages [index, end), the last one first
        for index in range(limit - 1, -1, -1):
            if self._first_page(group, end * self.page_size) > index:
                break
            page_id = find(group_key(keys[index], number))
            if page_id is None:
                end, tail = index, []
            else:
                tail.append(page_id)
        return PageRun(tail[::-1], end - len(tail))

    def _first_page(self, group: KVCacheGroup, num_computed: int) -> int:
        """Returns the index of the first page that tokens from position `num_computed` on see."""
        return group.first_needed(num_computed) // self.page_size

    def can_start(self, cached: CachedPrefix, num_tokens: int, *, more: int = 0) -> bool:
        """Returns whether `start` with these cached pages and then `extend` to `num_tokens` would succeed and leave `more` pages."""
        ids = [page_id for run in cached.runs for page_id in run.ids]
        kept = sum(self.pool.num_owners(page_id) == 0 for page_id in ids)
        return self.pool.can_allocate(max(self.num_pages_for(num_tokens) - len(ids), 0) + kept + more)

    def start(self, sequence: CachedSequence, cached: CachedPrefix) -> None:
        """Gives a running sequence its cached pages, and behind them what is saved of it; their tokens are computed."""
        num_saved = self.swap.num_tokens(sequence)
        num_computed = max(cached.num_tokens, num_saved)
        runs = [PageRun(list(run.ids), run.first) for run in cached.runs]
        self.pool.reuse(page_id for run in runs for page_id in run.ids)
        self._held[sequence] = _Held(runs, cached.num_tokens // self.page_size)
        if num_saved > cached.num_tokens:
            self._restore(sequence, runs, num_saved)
        else:
            self.swap.drop(sequence)
        sequence.num_computed = num_computed
        self._write_tables(sequence)

    def _restore(self, sequence: CachedSequence, runs: Sequence[PageRun], num_tokens: int) -> None:
        """Adds the saved pages that the cached ones lack."""
        for group, run in zip(self.layout.groups, runs, strict=True):
            if not run.ids:
                run.first = self._first_page(group, num_tokens)
        end = -(-num_tokens // self.page_size)
        new = iter(self.pool.allocate(sum(end - run.end for run in runs)))  # at once: all or none
        restored = [PageRun([next(new) for _ in range(end - run.end)], run.end) for run in runs]
        self.swap.restore(sequence, restored)
        for run, added in zip(runs, restored, strict=True):
            run.ids += added.ids

    # ---- what is kept, and what is freed

    def save(self, sequence: CachedSequence) -> bool:
        """Has a running sequence's computed pages copied to host memory before the coming step, if that pays."""
        num_tokens = self._num_known(sequence)
        end = -(-num_tokens // self.page_size)
        # A copy promised to this very step, which will not make it: the contents are still in the source.
        sources = {target: source for source, target in self._copies.get(sequence, ())}
        runs = []
        for group, run in zip(self.layout.groups, self._held[sequence].runs, strict=True):
            first = max(run.first, self._first_page(group, num_tokens))
            runs.append(PageRun([sources.get(one, one) for one in run.ids[first - run.first : end - run.first]], first))
        num_shared = 0
        if self.enable_prefix_caching and not self._windows:
            num_shared = next((i for i, page_id in enumerate(runs[0].ids) if self.pool.num_owners(page_id) < 2), len(runs[0].ids))
        return self.swap.save(sequence, runs, num_tokens, num_shared)

    def remember(self, sequence: CachedSequence, num_tokens: int) -> None:
        """Lets others find the full pages of positions `[0, num_tokens)`, which the coming step has computed.

        A row of the same step may read them: each layer writes the keys and values of all rows before any row attends.
        """
        count, held = num_tokens // self.page_size, self._held[sequence]
        if count <= held.num_named or not self.enable_prefix_caching or sequence.epoch == PRIVATE:
            return
        keys = page_keys(sequence, self.page_size, count)
        for group, run in enumerate(held.runs):
            for index in range(max(held.num_named, run.first), count):
                self.pool.remember(run.ids[index - run.first], group_key(keys[index], group))
        held.num_named = count

    def begin_epoch(self) -> None:
        """Steps run with other weights from now on: nobody finds a page of before, nor what running sequences add to theirs.

        What is saved of preempted sequences is dropped; they are computed again.
        """
        self.epoch += 1
        self.pool.forget()
        self.swap.forget()
        for sequence in self._held:
            sequence.epoch, sequence.page_keys = PRIVATE, []

    def distrust(self, sequence: CachedSequence) -> None:
        """Lets nobody find the pages that a sequence has, or had, to itself: they may hold NaN. Those that others share stay theirs."""
        keys = [group_key(key, group) for group in range(self.num_groups) for key in sequence.page_keys]
        for pool in (self.pool, self.swap.pool):
            for page_id in [] if pool is None else map(pool.find, keys):
                if page_id is not None and pool is not None and pool.num_owners(page_id) <= 1:
                    pool.unname(page_id)
        sequence.epoch, sequence.page_keys = PRIVATE, []

    def release(self, sequence: CachedSequence) -> None:
        """Frees all its pages, those of its last positions first: of cached pages the end of a prompt is evicted before its beginning."""
        held = self._held.pop(sequence, None)
        if held is not None:
            pages = [(index, page_id) for run in held.runs for index, page_id in enumerate(run.ids, run.first)]
            self.pool.free([page_id for _, page_id in sorted(pages, key=itemgetter(0), reverse=True)])
        self._copies.pop(sequence, None)

    def check(self, running: Iterable[CachedSequence]) -> None:
        """Proves that every used page is in exactly as many block tables as it has owners."""
        self.pool.check()
        running = set(running)
        assert set(self._held) <= running, "a sequence that does not run owns pages"
        owners = Counter(self._owned())
        assert len(owners) == self.pool.num_used, f"{self.pool.num_used} pages are used, but {len(owners)} are owned"
        for sequence, held in self._held.items():
            for number, (group, run) in enumerate(zip(self.layout.groups, held.runs, strict=True)):
                assert run.first <= self._first_page(group, self._num_known(sequence)), f"{sequence.request_id!r} lacks pages of its window"
                assert run.end >= -(-sequence.num_computed // self.page_size), f"{sequence.request_id!r} lacks pages"
                row = self._block_tables.ids[number, sequence.row, : run.end].tolist()
                assert row == [NULL_PAGE] * run.first + run.ids
        assert all(self.pool.num_owners(page_id) == count for page_id, count in owners.items())

    def _owned(self) -> Iterator[int]:
        for held in self._held.values():
            for run in held.runs:
                yield from run.ids
