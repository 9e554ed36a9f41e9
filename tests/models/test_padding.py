"""Rows of a step that hold no token: who leaves them out, and what the others are then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pjax import native
from pjax.layers.linear import Embedding, Linear, head_logits
from pjax.layers.stack import LayerStack

CONTEXT = SimpleNamespace(num_tokens=jnp.int32(4))


class Block(nnx.Module):
    """One whose product has the step's rows, or twice as many of half the width."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.inner = Linear(size, size, dtype=jnp.float32)

    def __call__(self, x: jax.Array, pages: jax.Array, layer: Any, context: Any) -> tuple[jax.Array, jax.Array]:
        return x + self.inner(x.reshape(-1, self.size)).reshape(x.shape), pages


def run(size: int, mode: str, **promise: bool) -> np.ndarray:
    stack = LayerStack(lambda: Block(size), 2, mode=mode, **promise)
    graph, state = nnx.split(stack)
    rng = np.random.default_rng(0)
    if mode == "scan":
        leaves = [jnp.stack([jnp.asarray(rng.standard_normal((size, size)), jnp.float32) for _ in range(2)])]
    else:
        leaves = [jnp.asarray(rng.standard_normal((size, size)), jnp.float32) for _ in range(2)]
    filled = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((6, 8)), jnp.float32)
    return np.asarray(filled(x, jnp.zeros(()), CONTEXT)[0])


@pytest.mark.parametrize("size", [8, 4])
def test_all_rows_are_computed_where_nothing_is_promised(size: int) -> None:
    np.testing.assert_allclose(run(size, "loop"), run(size, "unroll"), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(size, "scan"), run(size, "unroll"), rtol=1e-5, atol=1e-5)


def test_padding_is_left_out_where_rows_are_tokens() -> None:
    assert native.library() is not None, "make test builds it"
    looped, unrolled = (run(8, mode, rows_are_tokens=True) for mode in ("loop", "unroll"))
    np.testing.assert_allclose(looped[:4], unrolled[:4], rtol=1e-5, atol=1e-5)
    x = np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)
    np.testing.assert_array_equal(looped[4:], x[4:])  # the block adds what its product gives


@pytest.mark.parametrize("num_rows", [0, 1, 3, 5, 17, 40])
@pytest.mark.parametrize("is_tied", [True, False])
def test_logits_of_some_rows(num_rows: int, is_tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((40, 24), (101, 24)))
    embed, head = Embedding(101, 24, dtype=jnp.float32), Linear(24, 101, dtype=jnp.float32)
    embed.table[...] = weights if is_tied else jnp.full_like(weights, jnp.nan)
    head.kernel[...] = weights
    wanted = (np.asarray(x, np.float64) @ np.asarray(weights, np.float64).T)[:num_rows]
    for library in ("native", "none"):
        if library == "none":
            monkeypatch.setattr("pjax.native.products.native.library", lambda: None)
        logits = jax.jit(lambda x, count: head_logits(x, None if is_tied else head, embed, count))(x, jnp.int32(num_rows))
        assert logits.shape == (40, 101)
        np.testing.assert_allclose(logits[:num_rows], wanted, rtol=1e-4, atol=1e-4)
