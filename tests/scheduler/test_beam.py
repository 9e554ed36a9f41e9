"""When a beam search ends, on numbers small enough to follow by hand; tests/engine/test_beam_search.py compares with transformers."""

from __future__ import annotations

import numpy as np
import pytest

from pjax.params import BeamSearchParams
from pjax.scheduler.beam_search import BeamSearch, num_candidates

EOS = 0


def candidates(**logprobs: float) -> tuple[np.ndarray, np.ndarray]:
    """A beam's continuations by token, t7=-0.5 for token 7; the likeliest first."""
    ordered = sorted(logprobs.items(), key=lambda entry: -entry[1])
    return np.array([int(name[1:]) for name, _ in ordered], np.int32), np.array([value for _, value in ordered], np.float32)


@pytest.mark.parametrize(("early_stopping", "done"), [(True, True), (False, False), ("never", False)])
def test_early_stopping_is_content_with_as_many_as_there_are_beams(early_stopping: bool | str, done: bool) -> None:
    """Two have ended, with -1 and -1.3 / 2; a beam with -1.15 / 2 would still beat the first."""
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=5, early_stopping=early_stopping), 5, frozenset([EOS]))
    going = search.choose([[]], [candidates(t0=-1.0, t1=-1.05, t2=-1.1, t3=-9)])
    assert going == [(0, 1), (0, 2)] and not search.done
    going = search.choose([[1], [2]], [candidates(t0=-0.25, t3=-0.1, t4=-5, t5=-6), candidates(t0=-4, t3=-0.5, t4=-5, t5=-6)])
    assert [(one.tokens, round(one.score, 4)) for one in search.finished] == [([1, 0], -0.65), ([0], -1.0)]
    assert search.done is done
    assert going == ([] if done else [(0, 3), (1, 3)])


def test_an_end_counts_among_the_first_candidates_only() -> None:
    """As many as there are beams: one place later it is as if the token had not been there."""
    for place, ended in ((1, [([0], -1.1)]), (2, [])):
        search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=5), 5, frozenset([EOS]))
        found = [-1.0, -1.1, -1.2, -1.3]
        tokens = [token for token in (7, 8, 9) if token != EOS]
        tokens.insert(place, EOS)
        going = search.choose([[]], [(np.array(tokens, np.int32), np.array(found, np.float32))])
        assert going == [(0, 7), (0, 8)]
        assert [(one.tokens, round(one.score, 4)) for one in search.finished] == ended


def test_enough_candidates_are_looked_at_whichever_end() -> None:
    """Three tokens that may end a sequence are likelier than all others."""
    assert [num_candidates(4, num_eos) for num_eos in range(4)] == [8, 8, 12, 16]
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=5, early_stopping="never"), 5, frozenset([0, 1, 2]))
    likeliest = candidates(t0=-1.0, t1=-1.1, t2=-1.2, t3=-2, t4=-3, t5=-4, t6=-5, t7=-6)
    assert len(likeliest[0]) == search.num_candidates
    assert search.choose([[]], [likeliest]) == [(0, 3), (0, 4)] and not search.done
