"""Kernels of several kinds divided among devices: a kind says how its own arrays are divided, and nothing else knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from pjax import models
from pjax.checkpoints.weights import Recipe, Source, expand, load_into
from pjax.layers.kernels import FloatKernel, SideBySide
from pjax.models import llama
from pjax.models.sharding import MODEL_AXIS, divide, make_mesh
from tests.models.int8_kernel import Int8Kernel, quantised
from tests.tiny import CONFIG, write_model

OUT, HEAD, KEYS = "blocks.0.attention.out.kernel", "head.kernel", "blocks.1.attention.qkv.kernel"


def make(config: Any, mode: str) -> Any:
    """A model with int8 in the head, in the first layer's output and in the keys of the second one."""

    def int8(num_out: int, num_in: int, axes: Any) -> Int8Kernel:
        return Int8Kernel(jnp.zeros((num_out, num_in), jnp.int8), jnp.zeros(num_out), axes)

    model = llama.Model(config, layer_mode="unroll")
    first, second = list(model.blocks.layers)
    kernel = second.attention.qkv.kernel
    (_, q), (_, kv), _ = kernel.axes[0]
    queries, values = (
        FloatKernel(jnp.zeros((size, kernel.shape[1])), axes=(name, "embed")) for name, size in (("heads", q), ("kv_heads", kv))
    )
    second.attention.qkv.kernel = SideBySide([queries, int8(kv, kernel.shape[1], ("kv_heads", "embed")), values])
    for linear in (first.attention.out, model.head):
        linear.kernel = int8(*linear.kernel.shape, linear.kernel.axes)
    model.blocks.mode = mode
    model.blocks.set_layers([first, second])
    return model


def sources_of(config: Any) -> dict[str, Source]:
    """The table's, and the int8 arrays made of its tensors."""
    sources = expand(llama.weight_table(config), 2)
    for path, part in ((OUT, sources[OUT].parts[0]), (HEAD, sources[HEAD].parts[0]), (f"{KEYS}.parts.1", sources[KEYS].parts[1])):
        (num_out, num_in) = part[1]
        sources[f"{path}.values"] = Source((part,), recipe=Recipe(shape=(num_out, num_in), make=lambda array: quantised(array)[0]))
        sources[f"{path}.scales"] = Source((part,), recipe=Recipe(shape=(num_out,), make=lambda array: quantised(array)[1]))
    return sources


@pytest.mark.parametrize("mode", ["unroll", "scan", "loop"])
@pytest.mark.parametrize("size", [2, 4])
def test_logits_are_those_of_one_device(tmp_path: Path, size: int, mode: str) -> None:
    folder = write_model(tmp_path / "model", tokenizer=False)
    config = llama.Config.from_hf(CONFIG)
    tensors = {name: np.asarray(array) for name, array in models.to_hf_state(models.load(folder, progress=False)).items()}
    options: dict[str, Any] = {"stacked_layers": 2 if mode == "scan" else 0, "progress": False}
    graph, abstract = nnx.split(nnx.eval_shape(lambda: make(config, mode)))
    whole = nnx.merge(graph, load_into(abstract, sources_of(config), tensors.__getitem__, **options))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 20)), jnp.int32)
    wanted = jax.jit(lambda ids: models.forward(whole, ids))(ids)

    shares = divide(lambda of: make(of, mode), config, make_mesh(size))
    params = shares.load(sources_of(config), tensors.__getitem__, **options)
    flat = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(params)}
    values = flat["head.kernel.values"]
    assert values.dtype == jnp.int8 and values.addressable_shards[0].data.shape == (260 // size, 32)

    def run(model: Any, ids: jax.Array) -> jax.Array:
        return lax.all_gather(models.forward(model, ids), MODEL_AXIS, axis=2, tiled=True)

    np.testing.assert_allclose(jax.jit(shares.map(run))(params, ids), wanted, rtol=1e-4, atol=1e-4)
