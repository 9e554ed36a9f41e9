"""Copies of pages inside the step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax.runner.forward import copy_pages

LAYERS, PAGES, SIZE, WIDTH = 3, 8, 4, 6


@pytest.mark.parametrize("copies", [[], [(1, 2)], [(1, 2), (3, 4), (1, 7)], [(1, 2), (5, 1)]], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pages_are_copied_over_all_layers_one_after_the_other(copies: list[tuple[int, int]], dtype: jnp.dtype) -> None:
    pages = np.random.default_rng(0).standard_normal((LAYERS * PAGES, SIZE, WIDTH)).astype(dtype)
    expected = pages.copy().reshape(LAYERS, PAGES, SIZE, WIDTH)
    for source, target in copies:
        expected[:, target] = expected[:, source]
    padded = np.array([*copies, *[(6, 0)] * (4 - len(copies))], np.int32)
    out = jax.jit(copy_pages, static_argnums=3)(pages, padded, np.int32(len(copies)), LAYERS)
    assert out.dtype == dtype
    np.testing.assert_array_equal(np.asarray(out), expected.reshape(pages.shape))


def test_the_pool_is_updated_in_place() -> None:
    """In float32, as the pool is on a CPU: there XLA makes 16-bit floats in a loop 32 bits wide."""
    shape, dtype = (LAYERS * 1000, 16, 64), jnp.dtype("float32")
    pool = jax.ShapeDtypeStruct(shape, dtype)
    step = jax.jit(copy_pages, static_argnums=3, donate_argnums=0)
    compiled = step.lower(pool, jax.ShapeDtypeStruct((64, 2), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32), LAYERS).compile()
    memory = compiled.memory_analysis()
    size = int(np.prod(shape)) * dtype.itemsize
    assert memory.alias_size_in_bytes == size, "the pool that comes out is the one that went in"
    assert memory.temp_size_in_bytes < 10 * size // 1000, "temporaries of a few pages"
