"""What sampling asks of a whole vocabulary, against numpy. Shares of one are in tests/parallel."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pjax.sampling.vocabulary import BLOCK, NOT_FINITE, WHOLE

WIDTHS = (1, 2, BLOCK, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK - 1, 3 * BLOCK, 4 * BLOCK + 7)


def argmax(x: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(WHOLE.argmax)(x))


@pytest.mark.parametrize("width", WIDTHS)
def test_argmax_finds_every_place(width: int) -> None:
    """Each place has the largest value, alone and in a tie with every later one, with smaller numbers around or nothing but -inf."""
    alone = np.where(np.eye(width, dtype=bool), 1.0, -1.0).astype(np.float32)
    tied = np.where(np.arange(width) >= np.arange(width)[:, None], 1.0, -np.inf).astype(np.float32)
    for x in (alone, tied, np.where(alone > 0, -5.0, -np.inf).astype(np.float32)):
        np.testing.assert_array_equal(argmax(x), np.arange(width))


@pytest.mark.parametrize("width", WIDTHS)
def test_argmax_is_numpys(width: int) -> None:
    """Ties, zeros of both signs, rows of -inf alone."""
    rng = np.random.default_rng(width)
    x = np.round(rng.standard_normal((40, width)) * 2).astype(np.float32)
    x[:10] = rng.choice([0.0, -0.0], (10, width))
    x[10:14] = -np.inf
    found = argmax(x)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, x.argmax(axis=1))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [3, 64])  # XLA computes maxima of few rows in another way than those of many
def test_pick_gives_no_token_where_logits_are_not_finite(rows: int, width: int) -> None:
    """One NaN or +inf at any place, among others of either sign, or nothing but -inf; every other row gets its argmax."""
    rng = np.random.default_rng(width)
    x = rng.standard_normal((rows, width)).astype(np.float32)
    x[:, 1:][rng.random((rows, width - 1)) < 0.2] = -np.inf
    x[4::8][x[4::8] > -np.inf] = 3e38  # the sum is infinite, or NaN, though no value is
    expected = x.argmax(axis=1)
    for first, value in enumerate((np.nan, -np.nan, np.inf)):
        bad = np.arange(first, rows, 8)
        x[bad, rng.integers(0, width, len(bad))] = value
        expected[bad] = NOT_FINITE
    x[5::8], x[6::8], x[7::8] = -np.inf, np.nan, np.inf
    for first in (5, 6, 7):
        expected[first::8] = NOT_FINITE
    found = jax.jit(WHOLE.pick)(x)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(jax.jit(WHOLE.can_pick)(x), expected != NOT_FINITE)
