"""Copies of pages to host memory and back, against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from pjax.pallas_kernels.pages import pool_format
from pjax.runner.page_copies import COPY_SIZES, PageSwap

LAYERS, PAGES, SLOTS, SIZE, WIDTH = 3, 90, 130, 4, 6


def make(dtype: str = "float32") -> tuple[PageSwap, jax.Array, np.ndarray]:
    kept = pool_format(SingleDeviceSharding(jax.devices()[0]))
    pool = np.random.default_rng(0).standard_normal((LAYERS * PAGES, SIZE, WIDTH)).astype(dtype)
    swap = PageSwap(SLOTS, LAYERS, jax.ShapeDtypeStruct(pool.shape, pool.dtype, sharding=kept), kept)
    swap.warmup()
    return swap, jax.device_put(jnp.asarray(pool), kept), pool.reshape(LAYERS, PAGES, SIZE, WIDTH).copy()


def pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.stack([first, second], axis=1).astype(np.int32).reshape(-1, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_are_what_numpy_does(dtype: str) -> None:
    swap, pages, model = make(dtype)
    host = np.zeros((SLOTS, LAYERS, SIZE, WIDTH), model.dtype)
    known = np.zeros(SLOTS, bool)
    rng, compiled = np.random.default_rng(1), swap.num_compilations
    assert compiled == 2 * len(COPY_SIZES)
    for count_out, count_in in ((0, 0), (1, 0), (3, 1), (64, 4), (5, 5), (90, 0), (17, 65), (0, 90), (64, 64), (2, 0), (0, 1)):
        outs = pairs(rng.permutation(PAGES)[:count_out], rng.permutation(SLOTS)[:count_out])
        host[outs[:, 1]] = np.moveaxis(model[:, outs[:, 0]], 1, 0)
        known[outs[:, 1]] = True
        slots = rng.permutation(np.flatnonzero(known))[:count_in]
        ins = pairs(slots, rng.permutation(PAGES)[: len(slots)])
        model[:, ins[:, 1]] = np.moveaxis(host[ins[:, 0]], 0, 1)
        pages = swap.apply(pages, outs, ins)
        np.testing.assert_array_equal(np.asarray(pages).reshape(model.shape), model)
    assert swap.num_compilations == compiled


def test_a_slot_written_twice_holds_the_later_page() -> None:
    swap, pages, model = make()
    nothing = np.zeros((0, 2), np.int32)
    for page_id in range(20):  # more than may be on their way at once
        pages = swap.apply(pages, pairs(np.array([page_id]), np.array([7])), nothing)
    pages = swap.apply(pages, nothing, pairs(np.array([7]), np.array([50])))
    np.testing.assert_array_equal(np.asarray(pages).reshape(model.shape)[:, 50], model[:, 19])


def test_a_copy_out_reads_before_the_pool_is_given_away() -> None:
    swap, pages, model = make()
    spoil = jax.jit(lambda pool: jnp.full_like(pool, jnp.nan), donate_argnums=0)
    everything, nothing = np.arange(PAGES), np.zeros((0, 2), np.int32)
    pages = swap.apply(pages, pairs(everything, everything), nothing)
    pages = swap.apply(spoil(pages), nothing, pairs(everything, everything))
    np.testing.assert_array_equal(np.asarray(pages).reshape(model.shape), model)


def test_measuring_changes_nothing() -> None:
    swap, pages, model = make()
    pages, count, seconds = swap.measure(pages)
    assert count == 64 and 0 < seconds < 60
    np.testing.assert_array_equal(np.asarray(pages).reshape(model.shape), model)
