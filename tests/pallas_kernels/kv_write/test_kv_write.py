"""Writes of a step's keys and values: XLA's and the native kernel's, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax import native
from pjax.pallas_kernels import pool_shape, write_targets
from pjax.pallas_kernels.kv_write import SlotTargets
from tests.pallas_kernels.paged_attention.suite import Feature, Step, make_step


@pytest.fixture(scope="module")
def one() -> Step:
    return make_step(Feature("one", (4, 2, 16), 8))


@pytest.mark.parametrize("pool_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("is_native", [False, True])
def test_a_write_changes_only_the_named_slots(is_native: bool, dtype: str, pool_dtype: str) -> None:
    assert native.library() is not None
    pool = jnp.full(pool_shape(2, 3, 4, 2, 8), jnp.nan, pool_dtype)
    keys, values = jnp.full((3, 2, 8), 1.5, dtype), jnp.arange(48, dtype=dtype).reshape(3, 2, 8)
    targets = SlotTargets(jnp.array([5, 11, pool.shape[0] * 4], jnp.int32), is_native)  # the last one is padding
    out = np.asarray(jax.jit(lambda *arrays: targets.write(*arrays, 3), donate_argnums=0)(pool, keys, values)).reshape(-1, 2, 2, 8)
    assert (out[[17, 23], 0] == 1.5).all()
    np.testing.assert_array_equal(out[[17, 23], 1], np.arange(32, dtype=np.float32).reshape(2, 2, 8))
    assert np.isnan(np.delete(out, [17, 23], axis=0)).all()


def test_a_native_write_rounds_as_numpy_does() -> None:
    assert native.library() is not None
    numbers = np.random.default_rng(0).normal(size=(1, 2, 512)).astype(np.float32)
    numbers[0, 0, :6] = np.array([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7FFFFF, 0x00000001, 0x7FC00000], np.uint32).view(np.float32)
    pool, keys = jnp.zeros((1, 1, 2048), jnp.bfloat16), jnp.asarray(numbers)
    out = jax.jit(lambda pool: SlotTargets(jnp.zeros(1, jnp.int32), is_native=True).write(pool, keys, keys, 0))(pool)
    got, expected = np.asarray(out).reshape(2, 1024)[0], numbers.reshape(-1).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))


def test_a_pool_that_is_not_given_away_stays_as_it_is() -> None:
    assert native.library() is not None
    pool = jnp.zeros(pool_shape(1, 3, 4, 2, 8))
    targets = SlotTargets(jnp.array([2], jnp.int32), is_native=True)
    out = jax.jit(lambda pool, keys: targets.write(pool, keys, keys, 0))(pool, jnp.ones((1, 2, 8)))
    assert float(out.sum()) == 32
    assert float(pool.sum()) == 0


@pytest.mark.parametrize("backend", ["xla", "tpu", "native"])
def test_bad_writes_are_named(one: Step, backend: str) -> None:
    keys = jnp.ones((1, 2, 16))
    targets = write_targets(one.batch, one.pool, 1, backend=backend)
    for wrong in (keys.reshape(1, 32), keys.reshape(1, 16, 2)[:, :8], jnp.ones((2, 2, 16)), keys.astype(jnp.int32)):
        with pytest.raises(ValueError, match=r"(keys|values) is .*, but must be floating \[T, K, H\]|but must be \[P, G, 2·K·H\]"):
            targets.write(one.pool, wrong, wrong, 0)
    with pytest.raises(ValueError, match="backend of the KV write is 'gpu'"):
        write_targets(one.batch, one.pool, 1, backend="gpu")
    with pytest.raises(NotImplementedError, match="takes pages of a multiple of 8 tokens, but they have 12; 'xla' takes any"):
        write_targets(one.batch, jnp.zeros((4, 12, 64)), 1, backend="tpu")
    with pytest.raises(NotImplementedError, match="takes pages of float32 or bfloat16, but they are float16; 'xla' takes any"):
        write_targets(one.batch, one.pool.astype(jnp.float16), 1, backend="native")
