"""The native product of a CPU against float64, and against XLA's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax import native
from pjax.native import products

# Rows, in and out: tiles that come out even and do not, several passes over `in`, several panels, several threads.
SIZES = [(1, 64, 7), (2, 70, 64), (3, 5, 12), (5, 1000, 33), (13, 40, 41), (17, 576, 100), (31, 20, 9)]
SIZES += [(6, 1600, 300), (8, 20, 13), (64, 33, 200), (130, 1600, 260), (48, 3100, 90)]


native_product = jax.jit(products._native)


def draw(rng: np.random.Generator, *shape: int, dtype: Any) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), dtype)


def test_avx512s_bfloat16_units_are_hidden_with_it(cpu_level: str) -> None:
    cpu = Path("/proc/cpuinfo")
    has_them = "avx512_bf16" in (cpu.read_text() if cpu.exists() else "")
    assert products._has_bfloat16_units() == (has_them and cpu_level in ("avx512", "amx"))


@pytest.mark.parametrize(("rows", "num_in", "num_out"), SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_those_of_float64(dtype: str, rows: int, num_in: int, num_out: int, cpu_level: str) -> None:
    rng = np.random.default_rng(rows)
    x, kernel = draw(rng, rows, num_in, dtype=dtype), draw(rng, num_out, num_in, dtype=dtype)
    y = native_product(x, (kernel,), jnp.int32(0), jnp.int32(rows))
    assert y.dtype == jnp.float32
    wanted = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, atol=1e-5 * num_in**0.5)


@pytest.mark.parametrize("num_rows", [0, 1, 3, 6, 11, 20, 40, 99])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_native_kernel_skips_rows_that_do_not_count(dtype: str, num_rows: int, cpu_level: str) -> None:
    """It makes them zeros. The others are what they are alone, bit for bit; more rows than there are is all of them."""
    rng = np.random.default_rng(num_rows)
    x, kernel = draw(rng, 40, 70, dtype=dtype), draw(rng, 101, 70, dtype=dtype)
    padded = x.at[num_rows:].set(jnp.nan)
    y = np.asarray(native_product(padded, (kernel,), jnp.int32(0), jnp.int32(num_rows)))
    np.testing.assert_array_equal(y[num_rows:], 0)
    if num_rows:
        alone = native_product(x[:num_rows], (kernel,), jnp.int32(0), jnp.int32(min(num_rows, 40)))
        np.testing.assert_array_equal(y[:num_rows], alone)


@pytest.mark.parametrize("num_rows", [0, 1, 8, 9, 30, 40])
@pytest.mark.parametrize("has_units", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_that_do_not_count_are_zeros_and_not_read(dtype: str, has_units: bool, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever path: a CPU with bfloat16 units takes XLA's for many rows, which computes all of them."""
    monkeypatch.setattr(products, "_has_bfloat16_units", lambda: has_units)
    rng = np.random.default_rng(num_rows)
    x, kernel = draw(rng, 40, 70, dtype=dtype), draw(rng, 101, 70, dtype=dtype)
    y = jax.jit(lambda *arrays: products.product(*arrays))(x.at[num_rows:].set(jnp.nan), (kernel,), 0, jnp.int32(num_rows))
    assert y.shape == (40, 101)
    wanted = np.asarray(x, np.float64)[:num_rows] @ np.asarray(kernel, np.float64).T
    np.testing.assert_allclose(np.asarray(y, np.float64)[:num_rows], wanted, atol=1e-4)
    np.testing.assert_array_equal(y[num_rows:], 0)


def test_only_the_chosen_kernel_is_read() -> None:
    rng = np.random.default_rng(0)
    x, kernel = draw(rng, 6, 40, dtype="float32"), draw(rng, 20, 40, dtype="float32")
    kernels = (jnp.full_like(kernel, jnp.nan), kernel, jnp.full_like(kernel, jnp.inf))
    y = jax.jit(products.product)(x, kernels, jnp.int32(1))
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_rows", [7, 30])
def test_a_row_that_is_nan_stays_alone(num_rows: int) -> None:
    rng = np.random.default_rng(0)
    x, kernel = draw(rng, num_rows, 40, dtype="float32"), draw(rng, 20, 40, dtype="float32")
    y = np.array(jax.jit(products.product)(x.at[3].set(jnp.nan), (kernel,)))
    assert np.isnan(y[3]).all() and np.isfinite(np.delete(y, 3, axis=0)).all()


def test_a_row_is_added_in_three_orders_at_most(cpu_level: str) -> None:
    """Alone, among few rows, and packed, whatever its company and its place are; which numbers of rows are packed is the vectors' width."""
    rng = np.random.default_rng(0)
    row, kernel = draw(rng, 1, 1700, dtype="float32"), draw(rng, 40, 1700, dtype="float32")
    found = set[bytes]()
    for num_rows in (*range(1, 19), 24, 25, 30, 61):
        for place in {0, num_rows // 2, num_rows - 1}:
            x = draw(rng, num_rows, 1700, dtype="float32").at[place].set(row[0])
            found.add(np.asarray(products.product(x, (kernel,)))[place].tobytes())
    assert len(found) <= 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_xlas(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, kernels = draw(rng, 9, 40, dtype=dtype), tuple(draw(rng, 20, 40, dtype=dtype) for _ in range(3))

    def loss(x: jax.Array, kernels: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.sum(jnp.tanh(products.product(x, kernels, jnp.int32(2))))

    own = jax.jit(jax.grad(loss, (0, 1)))(x, kernels)
    monkeypatch.setattr(native, "library", lambda: None)
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(jax.grad(loss, (0, 1))(x, kernels)), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("has_units", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_that_do_not_count_have_no_gradient(dtype: str, has_units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_bfloat16_units", lambda: has_units)
    rng = np.random.default_rng(0)
    x, kernel = draw(rng, 9, 40, dtype=dtype), draw(rng, 20, 40, dtype=dtype)

    def loss(x: jax.Array, kernel: jax.Array, *count: int) -> jax.Array:
        return jnp.sum(jnp.sin(1 + products.product(x, (kernel,), 0, *count)))

    one, kernel_one = jax.grad(loss, (0, 1))(x.at[6:].set(jnp.nan), kernel, 6)
    other, kernel_other = jax.grad(loss, (0, 1))(x[:6], kernel)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(np.asarray(one, np.float32), np.pad(np.asarray(other, np.float32), ((0, 3), (0, 0))), atol=tolerance)
    np.testing.assert_allclose(np.asarray(kernel_one, np.float32), np.asarray(kernel_other, np.float32), atol=tolerance)


def test_float16_and_an_installation_without_a_compiler_go_through_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)

    def text(dtype: str) -> str:
        fresh = jax.jit(lambda x, kernel: products.product(x, (kernel,)))  # traced again after the patch
        return fresh.lower(draw(rng, 9, 40, dtype=dtype), draw(rng, 20, 40, dtype=dtype)).as_text()

    assert native.PRODUCT in text("float32") and native.PRODUCT not in text("float16")
    monkeypatch.setattr(native, "library", lambda: None)
    assert native.PRODUCT not in text("float32")


def test_bfloat16_units_take_products_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_bfloat16_units", lambda: True)
    kernel = jnp.zeros((20, 40), jnp.bfloat16)
    many, few = (jax.jit(products.product).lower(jnp.zeros((rows, 40), jnp.bfloat16), (kernel,)).as_text() for rows in (9, 8))
    assert native.PRODUCT in few and native.PRODUCT not in many


def test_vmap() -> None:
    rng = np.random.default_rng(0)
    x, kernel = draw(rng, 3, 5, 40, dtype="float32"), draw(rng, 20, 40, dtype="float32")
    y = jax.vmap(lambda rows: products.product(rows, (kernel,)))(x)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T, rtol=1e-4, atol=1e-5)
