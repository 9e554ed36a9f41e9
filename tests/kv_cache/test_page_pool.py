"""The page pool against a dict of owners: nothing is lost, nothing is owned twice, a failing call changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pjax.kv_cache.page_pool import PagePool
from tests.budget import examples


def owners_of(pool: PagePool) -> list[int]:
    return [pool.num_owners(page_id) for page_id in range(pool.num_pages)]


class PagePoolMachine(RuleBasedStateMachine):
    """The model: page -> how many own it; free pages are not in it."""

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.owners: Counter[int] = Counter()

    @rule(count=st.integers(0, 13))
    def allocate(self, count: int) -> None:
        fits = len(self.owners) + count <= self.pool.num_pages
        assert self.pool.can_allocate(count) == fits
        if not fits:
            with pytest.raises(MemoryError, match=f"{count} pages are wanted"):
                self.pool.allocate(count)
            return
        taken = self.pool.allocate(count)
        assert len(taken) == len(set(taken)) == count
        assert set(taken) <= set(range(self.pool.num_pages)) - set(self.owners)
        self.owners.update(taken)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def fork_owned(self, data: st.DataObject) -> None:
        page_ids = data.draw(st.lists(st.sampled_from(sorted(self.owners)), max_size=6))
        self.pool.fork(iter(page_ids))
        self.owners.update(page_ids)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free_owned(self, data: st.DataObject) -> None:
        page_ids = data.draw(st.lists(st.sampled_from(sorted(self.owners.elements())), max_size=6))
        page_ids = list((Counter(page_ids) & self.owners).elements())  # no more often than there are owners
        self.pool.free(iter(page_ids))
        self.owners -= Counter(page_ids)

    @rule(page_ids=st.lists(st.integers(-2, 13), min_size=1, max_size=4))
    def fork_any(self, page_ids: list[int]) -> None:
        if all(page_id in self.owners for page_id in page_ids):
            self.pool.fork(page_ids)
            self.owners.update(page_ids)
        else:
            with pytest.raises(ValueError, match=r"page -?\d+ (has|is not in)"):
                self.pool.fork(page_ids)

    @rule(page_ids=st.lists(st.integers(-2, 13), min_size=1, max_size=4))
    def free_any(self, page_ids: list[int]) -> None:
        if Counter(page_ids) <= self.owners:
            self.pool.free(page_ids)
            self.owners -= Counter(page_ids)
        else:
            with pytest.raises(ValueError, match=r"page -?\d+ (has|is not in)"):
                self.pool.free(page_ids)

    @invariant()
    def agrees(self) -> None:
        assert owners_of(self.pool) == [self.owners[page_id] for page_id in range(self.pool.num_pages)]
        assert self.pool.num_used == len(+self.owners)
        assert self.pool.num_free + self.pool.num_used == self.pool.num_pages
        self.pool.check()

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.free(list(self.owners.elements()))
        assert self.pool.num_used == 0
        assert sorted(self.pool.allocate(self.pool.num_pages)) == list(range(self.pool.num_pages))


TestPagePool = PagePoolMachine.TestCase
TestPagePool.settings = settings(max_examples=examples(100), stateful_step_count=30, deadline=None)


def test_a_pool_has_pages() -> None:
    with pytest.raises(ValueError, match="num_pages is 0, but must be >= 1"):
        PagePool(0)


def test_pages_freed_last_are_reused_first() -> None:
    pool = PagePool(4)
    assert pool.allocate(3) == [0, 1, 2]
    pool.free([0, 2])
    assert pool.allocate(3) == [2, 0, 3]


def test_too_few_pages_take_nothing() -> None:
    pool = PagePool(3)
    pool.allocate(1)
    with pytest.raises(MemoryError, match="3 pages are wanted, but 2 of 3 are free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_page_is_free_when_its_last_owner_leaves() -> None:
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    pool.fork([page])
    pool.free([page])
    assert (pool.num_owners(page), pool.num_used) == (1, 1)
    pool.free([page])
    assert (pool.num_owners(page), pool.num_used) == (0, 0)
    with pytest.raises(ValueError, match=f"page {page} has no owner"):
        pool.free([page])


@pytest.mark.parametrize("wrong", [[0, 2], [0, 0, 9], [1, -1]])
@pytest.mark.parametrize("method", ["fork", "free"])
def test_a_list_with_one_wrong_page_changes_nothing(method: str, wrong: list[int]) -> None:
    pool = PagePool(3)
    pool.fork(pool.allocate(2))
    with pytest.raises(ValueError, match=r"page (2 has|9 is not in|-1 is not in)"):
        getattr(pool, method)(wrong)
    assert owners_of(pool) == [2, 2, 0]


def test_a_page_listed_more_often_than_owned_changes_nothing() -> None:
    pool = PagePool(2)
    pool.allocate(2)
    with pytest.raises(ValueError, match="page 1 has"):
        pool.free([0, 1, 1])
    assert owners_of(pool) == [1, 1]


def lose_an_owner(pool: PagePool) -> None:
    pool._counts[0] = 0


def plant_a_negative_count(pool: PagePool) -> None:
    pool._counts[0] = -1


CORRUPTIONS: dict[str, tuple[Callable[[PagePool], None], str]] = {
    "a page freed twice": (lambda pool: pool._free.append(2), r"freed? twice: \[2\]"),
    "an owned page in the free list": (lambda pool: pool._free.append(0), r"or both: \[0\]"),
    "a free page that is not in the list": (lambda pool: pool._free.remove(2), r"neither free nor owned, or both: \[2\]"),
    "an owned page that lost its owner": (lose_an_owner, r"neither free nor owned, or both: \[0\]"),
    "a negative count": (plant_a_negative_count, r"\[0\]"),
    "a page that the pool does not have": (lambda pool: pool._free.append(7), "7"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_check_finds(name: str) -> None:
    corrupt, message = CORRUPTIONS[name]
    pool = PagePool(4)
    pool.allocate(2)
    pool.check()
    corrupt(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check()
