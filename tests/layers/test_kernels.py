"""Kernels of several kinds in one model, against numpy in float64. The second kind is tests/models/int8_kernel.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pjax import LLM, SamplingParams, models, native
from pjax.checkpoints.weights import expand, load_into, to_sources
from pjax.errors import CheckpointError, ConfigError
from pjax.layers.kernels import FloatKernel, Kernel, LayerKernels, SideBySide, side_by_side
from pjax.layers.linear import Embedding, Linear, head_logits
from pjax.layers.modules import kernels_in
from pjax.layers.norms import RMSNorm
from pjax.layers.stack import LayerStack
from tests.engine import common
from tests.models.int8_kernel import Int8Kernel, as_int8
from tests.tiny import write_model

MODES = ("unroll", "scan", "loop")


def floats(rng: np.random.Generator, *shape: int) -> FloatKernel:
    return FloatKernel(jnp.asarray(rng.standard_normal(shape), jnp.float32), axes=("ffn", "embed"))


def int8(rng: np.random.Generator, *shape: int) -> Int8Kernel:
    values, scales = rng.integers(-128, 128, shape), rng.random(shape[0]) / 64
    return Int8Kernel(jnp.asarray(values, jnp.int8), jnp.asarray(scales, jnp.float32), ("ffn", "embed"))


def both(rng: np.random.Generator, num_out: int, num_in: int) -> Kernel:
    return side_by_side([floats(rng, 3, num_in), int8(rng, num_out - 3, num_in)])


def other_way_round(rng: np.random.Generator, num_out: int, num_in: int) -> Kernel:
    return side_by_side([int8(rng, 3, num_in), floats(rng, num_out - 3, num_in)])


def bfloat16(rng: np.random.Generator, *shape: int) -> FloatKernel:
    return FloatKernel(floats(rng, *shape)[...].astype(jnp.bfloat16), axes=("ffn", "embed"))


KINDS: dict[str, Any] = {"float": floats, "int8": int8, "both": both, "other": other_way_round, "bfloat16": bfloat16}


def in_float64(kernel: Any) -> np.ndarray:
    """[out, in]."""
    if isinstance(kernel, SideBySide):
        return np.concatenate([in_float64(part) for part in kernel.parts])
    if isinstance(kernel, FloatKernel):
        return np.asarray(kernel[...], np.float64)
    return np.asarray(kernel.values[...], np.float64) * np.asarray(kernel.scales[...], np.float64)[:, None]


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_multiplies_with_any_kind(kind: str) -> None:
    linear = Linear(16, 10, bias=True, dtype=jnp.float32)
    linear.kernel = kernel = KINDS[kind](np.random.default_rng(0), 10, 16)
    linear.bias[...] = draw(10)
    x = draw(5, 16)
    wanted = np.asarray(x, np.float64) @ in_float64(kernel).T + np.asarray(draw(10), np.float64)
    np.testing.assert_allclose(jax.jit(lambda x: linear(x))(x), wanted, atol=1e-4)
    assert (kernel.shape, kernel.axes[1]) == ((10, 16), "embed")


@pytest.mark.parametrize("num_rows", [None, 0, 3, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_by_a_head_of_any_kind(kind: str, num_rows: int | None) -> None:
    head = Linear(16, 10, dtype=jnp.float32)
    head.kernel = kernel = KINDS[kind](np.random.default_rng(0), 10, 16)
    x = draw(20, 16)
    count = None if num_rows is None else jnp.int32(num_rows)
    logits = jax.jit(lambda x, count: head_logits(x, head, Embedding(10, 16, dtype=jnp.float32), count))(x, count)
    assert (logits.shape, logits.dtype) == ((20, 10), jnp.float32)
    wanted = (np.asarray(x, np.float64) @ in_float64(kernel).T)[:num_rows]
    np.testing.assert_allclose(logits[:num_rows], wanted, atol=1e-4)


class Block(nnx.Module):
    """A norm, a product in a list and an array [1, 8] that is no kernel."""

    def __init__(self, kernel: Kernel | None = None) -> None:
        self.shift = nnx.Param(jnp.zeros((1, 8)))
        self.norm = RMSNorm(8, epsilon=1e-6, dtype=jnp.float32)
        self.products = nnx.List([Linear(8, 8, dtype=jnp.float32)])
        if kernel is not None:
            self.products[0].kernel = kernel

    def __call__(self, x: jax.Array, pages: jax.Array, layer: Any, context: Any) -> tuple[jax.Array, jax.Array]:
        return x + self.shift[...] + self.products[0](self.norm(x)), pages


def blocks(kinds: Sequence[str]) -> list[Block]:
    rng = np.random.default_rng(0)
    made = [Block(KINDS[kind](rng, 8, 8)) for kind in kinds]
    for block in made:
        block.norm.scale[...] = jnp.asarray(rng.standard_normal(8), jnp.float32)
        block.shift[...] = jnp.asarray(rng.standard_normal((1, 8)), jnp.float32)
    return made


def blocks_in_float64(x: jax.Array, layers: Sequence[Block]) -> np.ndarray:
    y = np.asarray(x, np.float64)
    for block in layers:
        normed = y / np.sqrt((y * y).mean(axis=-1, keepdims=True) + 1e-6) * np.asarray(block.norm.scale[...], np.float64)
        y = y + np.asarray(block.shift[...], np.float64) + normed @ in_float64(block.products[0].kernel).T
    return y


STACKS = [
    ("float", "int8", "int8", "both", "float"),
    ("int8",) * 3,
    ("both",) * 2,
    ("int8", "float"),
    ("both", "other"),
    ("bfloat16", "float"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kinds", STACKS, ids="-".join)
def test_layers_may_differ_in_kind(kinds: Sequence[str], mode: str) -> None:
    layers = blocks(kinds)
    stack = LayerStack(Block, len(kinds), mode=mode, rows_are_tokens=True)
    stack.set_layers(layers)
    x = draw(6, 8)
    graph, state = nnx.split(stack)
    context = SimpleNamespace(num_tokens=jnp.int32(4))  # the others are padding

    def run(state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x, jnp.zeros(()), context)[0]

    y = jax.jit(run)(state, x)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[:4], blocks_in_float64(x, layers)[:4], rtol=1e-4, atol=1e-4)
    assert any(isinstance(kernel, LayerKernels) for kernel in kernels_in(stack).values()) == (mode == "scan" and len(set(kinds)) > 1)


@pytest.mark.parametrize("mode", ["scan", "loop"])
def test_a_choice_among_kinds_copies_no_kernel(mode: str) -> None:
    """Each has 1 MiB; temporaries of a step take less than a quarter of that."""
    size, rng = 512, np.random.default_rng(0)

    class Wide(nnx.Module):
        def __init__(self, kernel: Kernel) -> None:
            self.product = Linear(size, size, dtype=jnp.float32)
            self.product.kernel = kernel

        def __call__(self, x: jax.Array, pages: jax.Array, layer: Any, context: Any) -> tuple[jax.Array, jax.Array]:
            return self.product(x), pages

    kernels = [floats(rng, size, size) if layer % 2 else SideBySide([floats(rng, size // 2, size)] * 2) for layer in range(4)]
    stack = LayerStack(lambda: Wide(kernels[0]), 4, mode=mode)
    stack.set_layers([Wide(kernel) for kernel in kernels])
    graph, state = nnx.split(stack)

    def run(state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x, jnp.zeros(()), None)[0]

    compiled = jax.jit(run).lower(state, draw(4, size)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < size * size * 4 / 4


def test_layers_that_differ_otherwise_are_refused() -> None:
    stack = LayerStack(Block, 2, mode="loop")
    with pytest.raises(ValueError, match=r"there are 3 layers, but must be 2"):
        stack.set_layers(blocks(["int8"] * 3))
    layers = blocks(["int8", "float"])
    layers[1].products[0].kernel = floats(np.random.default_rng(0), 7, 8)
    with pytest.raises(ValueError, match=r"layer 1 has \[7, 8\] at products\.0\.kernel, but layer 0 has \[8, 8\]"):
        stack.set_layers(layers)
    layers = blocks(["int8", "float"])
    layers[1].norm = None
    with pytest.raises(ValueError, match=r"layer 1 has nothing at norm\.scale, but layer 0 has \[8\]"):
        stack.set_layers(layers)


def test_float_kernels_side_by_side_are_one_array() -> None:
    rng = np.random.default_rng(0)
    parts = [floats(rng, 3, 8), floats(rng, 5, 8)]
    joined = side_by_side(parts)
    assert isinstance(joined, FloatKernel)
    assert joined.axes == ((("ffn", 3), ("ffn", 5)), "embed")
    np.testing.assert_array_equal(joined[...], np.concatenate([part[...] for part in parts]))
    mixed = both(rng, 8, 8)
    assert isinstance(mixed, SideBySide) and mixed.shape == (8, 8) and mixed.dtype == jnp.int8
    assert mixed.axes == ((("ffn", 3), ("ffn", 5)), "embed")
    assert native.library() is not None, "make test builds it"
    assert [kernel.skips_rows(draw(4, 8)) for kernel in (joined, SideBySide(parts), mixed)] == [True, True, False]
    with pytest.raises(ValueError, match=r"kernels side by side are \[3, 8\] with axis 'embed', \[3, 9\] with axis 'embed', but must"):
        side_by_side([floats(rng, 3, 8), floats(rng, 3, 9)])


# ---- a whole model


def as_float(kernel: Any) -> FloatKernel:
    return FloatKernel(jnp.asarray(in_float64(kernel), jnp.float32), axes=kernel.axes)


def mixed_model(folder: Path, mode: str, change: Any = lambda kernel: kernel) -> Any:
    """The checkpoint with int8 in the head, in the first layer's output and in the keys of the second one."""
    model = models.load(folder, layer_mode="unroll", progress=False)
    first, second = list(model.blocks.layers)
    first.attention.out.kernel = change(as_int8(first.attention.out.kernel))
    rows = second.attention.qkv.kernel[...]
    parts = [FloatKernel(rows[start:end], axes=("heads", "embed")) for start, end in ((0, 32), (32, 48), (48, 64))]
    second.attention.qkv.kernel = change(side_by_side([parts[0], as_int8(parts[1]), parts[2]]))
    model.head.kernel = change(as_int8(model.head.kernel))
    model.blocks.mode = mode
    model.blocks.set_layers([first, second])
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tokenizer=False)


OPTIONS: dict[str, Any] = common.OPTIONS | {"skip_tokenizer_init": True}


def tokens(llm: LLM) -> list[list[int]]:
    prompts = [np.random.default_rng(0).integers(0, 256, n).tolist() for n in (5, 30)]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("mode", ["loop", "scan", pytest.param("unroll", marks=pytest.mark.extended)])
def test_a_model_of_several_kinds_is_served(folder: Path, mode: str) -> None:
    """It gives the tokens of a model whose arrays are floats of the same values; and other ones after an update."""
    wanted = tokens(LLM(mixed_model(folder, "loop", as_float), **OPTIONS))
    mixed = mixed_model(folder, mode)
    llm = LLM(mixed, **OPTIONS)
    assert tokens(llm) == wanted
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(mixed))}
    layer = "blocks.layers.attention.qkv.kernel.of_layer.1" if mode == "scan" else "blocks.layers.1.attention.qkv.kernel"
    assert {"head.kernel.values", "head.kernel.scales", f"{layer}.parts.0", f"{layer}.parts.1.scales"} <= names
    turned = jax.tree.map(lambda leaf: leaf, nnx.to_pure_dict(nnx.state(mixed)))
    turned["head"]["kernel"]["scales"] = -turned["head"]["kernel"]["scales"]
    llm.update_params(turned)
    assert tokens(llm) != wanted
    turned["head"]["kernel"]["scales"] = jnp.zeros(3)
    with pytest.raises(ConfigError, match=r"head\.kernel\.scales is float32\[3\], but must be float32\[260\]"):
        llm.update_params(turned)


def test_float_parameters_of_two_types_are_refused(folder: Path) -> None:
    model = models.load(folder, progress=False)
    model.head.kernel = FloatKernel(model.head.kernel[...].astype(jnp.bfloat16))
    with pytest.raises(ConfigError, match="the model's parameters are bfloat16, float32, but must be of one type"):
        LLM(model, **OPTIONS)


@pytest.mark.parametrize("mode", MODES)
def test_float_parts_of_a_mixed_product_are_loaded_from_the_products_tensors(folder: Path, mode: str) -> None:
    """Every float parameter of a model that has `SideBySide` kernels, by layer."""
    from pjax.models import llama

    plain = models.load(folder, progress=False)
    model = models.load(folder, layer_mode="unroll", progress=False)
    first, second = list(model.blocks.layers)
    rows = second.attention.qkv.kernel[...]
    second.attention.qkv.kernel = SideBySide([FloatKernel(jnp.zeros_like(rows[at:end])) for at, end in ((0, 32), (32, 48), (48, 64))])
    model.blocks.mode = mode
    model.blocks.set_layers([first, second])
    sources = expand(llama.weight_table(model.config), 2)
    tensors = {name: np.asarray(array) for name, array in models.to_hf_state(plain).items()}
    stacked = 2 if mode == "scan" else 0
    state = nnx.state(model)
    loaded = load_into(jax.tree.map(jnp.zeros_like, state), sources, tensors.__getitem__, stacked_layers=stacked, progress=False)
    back = to_sources(loaded, sources, 2)
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(np.asarray(back[name]), array, err_msg=name)
    del sources["blocks.1.attention.qkv.kernel"]
    with pytest.raises(CheckpointError, match=r"no tensors for parameter blocks\.1\.attention\.qkv\.kernel"):
        load_into(state, sources, tensors.__getitem__, stacked_layers=stacked, progress=False)
