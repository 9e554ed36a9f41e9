"""What layers are told of a step: options that differ between them, and what is known of rows; against numpy in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pjax.errors import InvalidRequestError, UnsupportedError
from pjax.kv_cache.layout import KVCacheGroup, KVCacheLayout
from pjax.layers.attention import LayerOptions, PagedContext
from pjax.layers.stack import LayerStack
from pjax.models.dense import DenseContext
from pjax.pallas_kernels import RaggedBatch, pool_shape
from tests.pallas_kernels.paged_attention.suite import attend_in_float64

MODES = ("unroll", "scan", "loop")
NUM_HEADS, HEAD_SIZE, LAYERS = 2, 64, 3
OPTIONS: dict[str, Any] = {"sliding_window": (3, None, 3), "logit_softcap": (None, 2.0, None), "scale": (0.3, None, 0.1)}


class Block(nnx.Module):
    """Attention over its own input: keys and values are those of the first head."""

    def __init__(self, options: dict[str, Any], *, has_sinks: bool) -> None:
        self.sinks = nnx.Param(jnp.zeros(NUM_HEADS)) if has_sinks else None
        self.options = tuple(options.items())

    def __call__(self, x: jax.Array, pages: Any, layer: Any, context: Any) -> tuple[jax.Array, Any]:
        heads = x.reshape(x.shape[0], NUM_HEADS, HEAD_SIZE)
        keys = heads[:, :1]
        options = LayerOptions(**dict(self.options), sinks=None if self.sinks is None else self.sinks[...])
        out, pages = context.attend(pages, heads, keys, keys * 0.5, layer, options)
        return x + out.reshape(x.shape), pages


def stack_of(mode: str, sinks: np.ndarray | None) -> LayerStack:
    stack = LayerStack(lambda: Block(OPTIONS, has_sinks=sinks is not None), LAYERS, mode=mode)
    if sinks is not None and mode == "scan":
        stack.layers.sinks[...] = jnp.asarray(sinks)
    elif sinks is not None:
        for layer, own in zip(stack.layers, sinks, strict=True):
            layer.sinks[...] = jnp.asarray(own)
    return stack


def expected(x: jax.Array, sinks: np.ndarray | None) -> np.ndarray:
    y = np.asarray(x, np.float64)
    for layer in range(LAYERS):
        heads = y.reshape(-1, NUM_HEADS, HEAD_SIZE)
        kv = np.stack([heads[:, :1], heads[:, :1] * 0.5], axis=1)
        options = {name: values[layer] for name, values in OPTIONS.items()}
        y = y + attend_in_float64(heads, kv, **options, sinks=None if sinks is None else sinks[layer]).reshape(y.shape)
    return y


def paged(num_tokens: int, num_real: int, backend: str | None = None, **options: Any) -> tuple[PagedContext, jax.Array]:
    """A step of one row, of a sequence that begins with it, and its pool."""
    starts, lens, table = jnp.array([0, num_real], jnp.int32), jnp.array([num_real], jnp.int32), jnp.arange(1, 4, dtype=jnp.int32)[None]
    pool = jnp.zeros(pool_shape(LAYERS, 5, 8, 1, HEAD_SIZE), jnp.float32)
    return PagedContext.make(
        RaggedBatch(starts, lens, table, jnp.int32(0)), pool, num_tokens, KVCacheLayout.uniform(LAYERS), backend, **options
    ), pool


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("kind", ["paged", "dense"])
def test_options_may_differ_between_layers(kind: str, has_sinks: bool, mode: str) -> None:
    """Windows and caps are numbers for the backend, so the native kernel serves them; sinks are arrays of each layer."""
    rng = np.random.default_rng(0)
    sinks = rng.standard_normal((LAYERS, NUM_HEADS)).astype(np.float32) * 3 if has_sinks else None
    x = jnp.asarray(rng.standard_normal((12, NUM_HEADS * HEAD_SIZE)), jnp.float32)
    graph, state = nnx.split(stack_of(mode, sinks))

    def run(state: Any, x: jax.Array) -> jax.Array:
        if kind == "paged":
            context, pool = paged(12, 10, backend=None if has_sinks else "native")
            return nnx.merge(graph, state)(x, pool, context)[0][:10]
        context = DenseContext(positions=jnp.arange(10), length=10, rows=jnp.zeros(10, jnp.int32))
        return nnx.merge(graph, state)(x[:10], jnp.zeros(()), context)[0]

    np.testing.assert_allclose(np.asarray(jax.jit(run)(state, x), np.float64), expected(x[:10], sinks), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["unroll", "loop"])
def test_a_backend_that_does_not_apply_an_option_is_named_with_it(mode: str) -> None:
    stack = stack_of(mode, np.zeros((LAYERS, NUM_HEADS), np.float32))
    context, pool = paged(12, 10, backend="native")
    with pytest.raises(UnsupportedError, match="attention backend 'native' takes no sinks; 'xla' takes any"):
        stack(jnp.zeros((12, NUM_HEADS * HEAD_SIZE)), pool, context)


@pytest.mark.parametrize("mode", ["unroll", "loop"])
def test_layers_without_keys_and_values_have_no_pages(mode: str) -> None:
    """Layer 2 of three is the second of its group, also where the layer's number is traced."""
    layout = KVCacheLayout((KVCacheGroup((0, 2)),), 1, HEAD_SIZE)
    batch = RaggedBatch(jnp.array([0, 4]), jnp.array([4]), jnp.array([[1]]), jnp.int32(0))
    context = PagedContext.make(batch, jnp.zeros(pool_shape(2, 3, 8, 1, HEAD_SIZE)), 4, layout)

    def place(layer: Any) -> Any:
        return context._in_group(layer)[2]

    assert [int(place(layer) if mode == "unroll" else jax.jit(place)(layer)) for layer in (0, 2)] == [0, 1]


def test_a_choice_of_options_copies_no_pages() -> None:
    """The pool has 96 MiB; temporaries of a step take less than a tenth of it."""
    num_pages = 8192
    pool = jax.ShapeDtypeStruct(pool_shape(LAYERS, num_pages, 8, 1, HEAD_SIZE), jnp.float32)
    stack = stack_of("loop", None)
    batch = RaggedBatch(jnp.array([0, 10]), jnp.array([10]), jnp.arange(3)[None], jnp.int32(0))

    def run(x: jax.Array, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        return stack(x, pool, PagedContext.make(batch, pool, 12, KVCacheLayout.uniform(LAYERS)))

    x = jax.ShapeDtypeStruct((12, NUM_HEADS * HEAD_SIZE), jnp.float32)
    memory = jax.jit(run, donate_argnums=1).lower(x, pool).compile().memory_analysis()
    assert memory.temp_size_in_bytes < pool.size * 4 / 10


class Adding(nnx.Module):
    """Adds what is known of each token's row."""

    def __call__(self, x: jax.Array, pages: Any, layer: Any, context: Any) -> tuple[jax.Array, Any]:
        return x + context.token_values("slot", padding=-1)[:, None] * (layer + 1), pages


@pytest.mark.parametrize("mode", MODES)
def test_what_is_known_of_rows_reaches_every_layer(mode: str) -> None:
    starts = jnp.array([0, 1, 4, 4, 6], jnp.int32)
    batch = RaggedBatch(starts, jnp.array([9, 3, 0, 5], jnp.int32), jnp.zeros((4, 2), jnp.int32), jnp.int32(1))
    pool = jnp.zeros(pool_shape(2, 3, 8, 1, 8), jnp.float32)

    def run(slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        context = PagedContext.make(batch, pool, 8, KVCacheLayout.uniform(2), row_values={"slot": slots})
        return context.rows, LayerStack(Adding, 2, mode=mode)(jnp.zeros((8, 1), jnp.int32), pool, context)[0][:, 0]

    rows, found = jax.jit(run)(jnp.array([7, 0, 100, 5], jnp.int32))
    np.testing.assert_array_equal(rows, [0, 1, 1, 1, 3, 3, 4, 4])
    np.testing.assert_array_equal(found, [21, 0, 0, 0, 15, 15, -3, -3])
    with pytest.raises(InvalidRequestError, match=r"row value is 'slot', but must be one of \(none in this step\)"):
        PagedContext.make(batch, pool, 8, KVCacheLayout.uniform(2)).token_values("slot")


def test_row_values_that_no_layer_uses_are_not_in_the_program() -> None:
    """It is the same text but for the argument."""

    def lowered(**row_values: Any) -> str:
        def run(x: jax.Array, pool: jax.Array, slots: jax.Array) -> jax.Array:
            values = dict.fromkeys(row_values, slots)
            batch = RaggedBatch(jnp.array([0, 10]), jnp.array([10]), jnp.arange(3)[None], jnp.int32(0))
            return stack_of("loop", None)(x, pool, PagedContext.make(batch, pool, 12, KVCacheLayout.uniform(LAYERS), row_values=values))[0]

        pool = jax.ShapeDtypeStruct(pool_shape(LAYERS, 5, 8, 1, HEAD_SIZE), jnp.float32)
        arguments = jax.ShapeDtypeStruct((12, NUM_HEADS * HEAD_SIZE), jnp.float32), pool, jax.ShapeDtypeStruct((1,), jnp.int32)
        return jax.jit(run, keep_unused=True).lower(*arguments).as_text()

    assert lowered(slot=True) == lowered()
