"""Pages of preempted sequences that are kept in host memory: which slot has which, what is to be copied, and whether it pays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pjax.kv_cache.page_pool import PagePool, PageRun
from pjax.kv_cache.prefix import group_key
from pjax.kv_cache.sequence import CachedSequence

MODES = ("auto", "recompute", "swap")


@dataclass(slots=True)
class PreemptionCost:
    """What it costs to bring a preempted sequence back, by measured times; 0 is not measured yet.

    Recomputing costs its tokens times the time of a token in steps that compute prompts. Swapping costs a copy out and one
    back for each page. Both are upper bounds: a recomputed token may fill a step that runs anyhow, and copies run beside
    steps. Kwon et al. 2023, section 7.3, find neither better always: small pages favour recomputing, for their copies are small.
    """

    seconds_per_token: float = 0.0
    seconds_per_page: float = 0.0

    def observe_step(self, num_prefill: int, num_tokens: int, seconds: float) -> None:
        """Takes the time of a step into a running mean; steps without prompts say nothing about recomputing."""
        if num_prefill > 0:
            each = seconds / num_tokens
            self.seconds_per_token += (each - self.seconds_per_token) * (0.1 if self.seconds_per_token else 1.0)

    def observe_copy(self, num_pages: int, seconds: float) -> None:
        """Takes the time of a copy of so many pages, one way."""
        self.seconds_per_page = seconds / num_pages

    def swap_pays(self, num_tokens: int, num_copies: int) -> bool:
        """Whether to copy pages so many times, out and in, rather than to compute so many tokens again."""
        return num_copies * self.seconds_per_page < num_tokens * self.seconds_per_token


@dataclass(frozen=True, slots=True)
class _Saved:
    runs: list[PageRun]  # by group of layers; of slots, by the index of the page in the sequence
    num_tokens: int  # whose keys and values they hold

    @property
    def slots(self) -> list[int]:
        return [slot for run in self.runs for slot in run.ids]


class SwapSpace:
    """Host slots 0 .. num_slots - 1, each of one page; counted and found again by key as pages are.

    A full page that several sequences share is saved once. What is saved is only ever read by whoever owns it or has its key.
    """

    def __init__(self, num_slots: int, page_size: int, mode: str = "auto") -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, but must be one of {', '.join(MODES)}")
        self.mode = mode
        self.cost = PreemptionCost()
        self.pool = PagePool(num_slots) if num_slots > 0 and mode != "recompute" else None
        self.num_saved_pages = 0
        """Copied out since the start."""
        self.num_restored_pages = 0
        """Copied in since the start."""
        self._page_size = page_size
        self._saved: dict[CachedSequence, _Saved] = {}
        self._outs: list[tuple[int, int]] = []  # copies of the coming step: page, slot
        self._ins: list[tuple[int, int]] = []  # slot, page
        self._leaving: list[int] = []  # slots that the coming step reads for the last time

    def save(self, sequence: CachedSequence, runs: Sequence[PageRun], num_tokens: int, num_shared: int) -> bool:
        """Has the pages of a sequence's first `num_tokens` tokens copied out, if that pays and there is room; else nothing.

        Args:
          runs: its pages by group of layers; they must not be written before the copies of the coming step have read them.
          num_shared: pages at the beginning that others own too and that will likely be there when it comes back.
        """
        if self.pool is None or num_tokens == 0:
            return False
        keys = sequence.page_keys[: num_tokens // self._page_size]
        wanted = [
            (page, group_key(keys[index], group) if index < len(keys) else None)
            for group, run in enumerate(runs)
            for index, page in enumerate(run.ids, run.first)
        ]
        found = [None if key is None else self.pool.find(key) for _, key in wanted]
        missing = found.count(None)
        num_copies = missing + max(len(wanted) - num_shared, 0)
        if self.mode == "auto" and not self.cost.swap_pays(num_tokens - num_shared * self._page_size, num_copies):
            return False
        shared = [slot for slot in found if slot is not None]
        self.pool.reuse(shared)
        if not self.pool.can_allocate(missing):
            self.pool.free(shared)
            return False
        new = iter(self.pool.allocate(missing))
        slots = []
        for (page, key), slot in zip(wanted, found, strict=True):
            if slot is None:
                slot = next(new)
                self._outs.append((page, slot))
                if key is not None:
                    self.pool.remember(slot, key)
            slots.append(slot)
        self.num_saved_pages += missing
        left = iter(slots)
        self._saved[sequence] = _Saved([PageRun([next(left) for _ in run.ids], run.first) for run in runs], num_tokens)
        return True

    def num_tokens(self, sequence: CachedSequence) -> int:
        """Returns tokens whose keys and values are saved; 0 when nothing is."""
        saved = self._saved.get(sequence)
        return 0 if saved is None else saved.num_tokens

    def restore(self, sequence: CachedSequence, targets: Sequence[PageRun]) -> None:
        """Has saved pages copied in, to these pages of the pool by group; nothing of the sequence stays saved."""
        saved = self._saved.pop(sequence)
        for run, target in zip(saved.runs, targets, strict=True):
            self._ins += zip(run.ids[target.first - run.first :], target.ids, strict=True)
            self.num_restored_pages += len(target.ids)
        self._leaving += saved.slots

    def fork(self, sequence: CachedSequence, other: CachedSequence) -> None:
        """Lets another sequence have what is saved of this one, instead of what it had itself."""
        self.drop(other)
        saved = self._saved.get(sequence)
        if saved is not None and self.pool is not None:
            self.pool.fork(saved.slots)
            self._saved[other] = saved

    def drop(self, sequence: CachedSequence) -> None:
        """Frees what is saved of a sequence, if anything."""
        saved = self._saved.pop(sequence, None)
        if saved is not None and self.pool is not None:
            self.pool.free(reversed(saved.slots))

    def take(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The copies of the coming step, each told once: out (page, slot), then in (slot, page).

        All outs read before any in or the step itself writes; an in may read what an out of the same step has written.
        """
        outs, ins = self._outs, self._ins
        self._outs, self._ins = [], []
        self._free_leaving()
        return outs, ins

    def _free_leaving(self) -> None:
        if self.pool is not None:
            self.pool.free(reversed(self._leaving))
        self._leaving = []

    def forget(self) -> None:
        """Nothing is saved any more: contents are lost, or not to be relied on."""
        for sequence in list(self._saved):
            self.drop(sequence)
        self._free_leaving()
        self._outs, self._ins = [], []
        if self.pool is not None:
            self.pool.forget()

    def check(self, idle: Iterable[CachedSequence]) -> None:
        """Proves that every used slot has as many owners as sequences, none of which runs, have it saved."""
        if self.pool is None:
            assert not self._saved
            return
        self.pool.check()
        assert set(self._saved) <= set(idle), "something is saved of a sequence that runs or has ended"
        owners = Counter(slot for saved in self._saved.values() for slot in saved.slots) + Counter(self._leaving)
        assert len(owners) == self.pool.num_used, f"{self.pool.num_used} slots are used, but {len(owners)} are owned"
        assert all(self.pool.num_owners(slot) == count for slot, count in owners.items())
        for sequence, saved in self._saved.items():
            assert all(run.end == -(-saved.num_tokens // self._page_size) for run in saved.runs)
            assert saved.num_tokens <= sequence.num_tokens
