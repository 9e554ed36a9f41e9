"""What sampling asks of a whole vocabulary, against numpy. Shares of one are in tests/parallel."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pjax.sampling.vocabulary import BLOCK, WHOLE

WIDTHS = (1, 2, BLOCK, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK - 1, 3 * BLOCK, 4 * BLOCK + 7)


def argmax(x: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(WHOLE.argmax)(x))


@pytest.mark.parametrize("width", WIDTHS)
def test_argmax_finds_every_place(width: int) -> None:
    """Of each place, alone and in a tie with every later one, with smaller numbers around or nothing but -inf."""
    alone = np.where(np.eye(width, dtype=bool), 1.0, -1.0).astype(np.float32)
    tied = np.where(np.arange(width) >= np.arange(width)[:, None], 1.0, -np.inf).astype(np.float32)
    for x in (alone, tied, np.where(alone > 0, -5.0, -np.inf).astype(np.float32)):
        np.testing.assert_array_equal(argmax(x), np.arange(width))


@pytest.mark.parametrize("width", WIDTHS)
def test_argmax_is_numpys(width: int) -> None:
    """Ties, zeros of both signs, rows of -inf alone, and NaN, of which the first one is taken."""
    rng = np.random.default_rng(width)
    x = np.round(rng.standard_normal((40, width)) * 2).astype(np.float32)
    x[:10] = rng.choice([0.0, -0.0], (10, width))
    x[10:14] = -np.inf
    x[20:30][rng.random((10, width)) < 2 / width] = np.nan
    found = argmax(x)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, x.argmax(axis=1))
