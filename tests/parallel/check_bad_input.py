"""A mesh that does not fit is refused when an engine is made, with names and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from pjax import LLM, ConfigError, UnsupportedError, models
from tests.models.test_register import write
from tests.tiny import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 heads, 4 KV heads, a feed-forward width of 40."""
    sizes = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 40}
    return write_model(tmp_path_factory.mktemp("tiny"), tokenizer=False, **sizes)


def load(folder: Any, **options: Any) -> LLM:
    return LLM(folder, skip_tokenizer_init=True, lazy=True, progress=False, num_pages=40, max_model_len=64, **options)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, "over 3 devices: 3 must divide num_heads, which is 8"),
        (9, r"tensor_parallel_size is 9, but there are 8 devices \(cpu\)"),
        (0, "tensor_parallel_size is 0, but must be an integer >= 1"),
        (True, "tensor_parallel_size is True, but must be an integer >= 1"),
        (None, "tensor_parallel_size is None, but must be an integer >= 1"),
        ("2", "tensor_parallel_size is '2', but must be an integer >= 1"),
    ],
)
def test_sizes(folder: Path, size: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(folder, tensor_parallel_size=size)


def test_what_does_not_divide(tmp_path: Path) -> None:
    heads = {"hidden_size": 48, "num_attention_heads": 12, "tokenizer": False}
    write_model(tmp_path / "kv", num_key_value_heads=6, intermediate_size=40, **heads)
    with pytest.raises(ConfigError, match="over 4 devices: 4 must divide num_kv_heads, which is 6, or be a multiple"):
        load(tmp_path / "kv", tensor_parallel_size=4)
    write_model(tmp_path / "ffn", num_key_value_heads=12, intermediate_size=42, **heads)
    with pytest.raises(ConfigError, match="over 4 devices: 4 must divide intermediate_size, which is 42"):
        load(tmp_path / "ffn", tensor_parallel_size=4)


def test_meshes(folder: Path) -> None:
    devices = np.array(jax.devices())
    for mesh, message in (
        (Mesh(devices, ("x",)), "mesh has axes x, but must be a jax.sharding.Mesh with an axis 'model'"),
        ("8", "mesh is str, but must be a jax.sharding.Mesh with an axis 'model'"),
        (Mesh(devices[:6].reshape(2, 3), ("data", "model")), "over 3 devices: 3 must divide num_heads, which is 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(folder, mesh=mesh)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 4, but the mesh that was given has 2 along 'model'"):
        load(folder, mesh=Mesh(devices[:2], ("model",)), tensor_parallel_size=4)


def test_models_and_parameters(folder: Path) -> None:
    with pytest.raises(ConfigError, match="tensor parallelism with a model that is a module: give the checkpoint's path"):
        load(models.load(folder, progress=False), tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r"blocks.layers.0.attention.out.kernel is placed as Single.*, but must be as NamedSharding"):
        load(folder, tensor_parallel_size=2, params=models.open_model(folder, dtype="float32", layer_mode="loop").load(progress=False))


def test_a_family_that_names_no_axes(tmp_path: Path) -> None:
    models.register_family("ToyForCausalLM", "tests.models.toy_family")
    try:
        write(tmp_path)
        with pytest.raises(UnsupportedError, match="ToyConfig has no num_heads, intermediate_size, which a model's share needs"):
            load(tmp_path, tensor_parallel_size=2)
    finally:
        del models.FAMILIES["ToyForCausalLM"]
