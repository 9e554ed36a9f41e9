"""Parameters that are made of several tensors of a checkpoint: here int8 values and a scale for each row."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from pjax import models
from pjax.checkpoints.weights import Piece, Recipe, Source, Weight, load_into
from pjax.convert import convert
from pjax.errors import CheckpointError, UnsupportedError
from tests.models import toy_family

WIDTH, VOCAB, LAYERS = 8, 11, 2
SHAPE = (3 * WIDTH, WIDTH)
PLAIN = toy_family.weight_table


def dequantised(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) * scales[:, None]


def table(config: Any, **changes: Any) -> dict[str, Weight]:
    weights = PLAIN(config)
    del weights["blocks.{}.qkv"]
    recipe = Recipe(shape=SHAPE, make=dequantised)
    tensors = (("toy.{}.qkv.values", SHAPE), ("toy.{}.qkv.scales", SHAPE[:1]))
    return weights | {"blocks.{}.qkv.kernel": Weight.made(dataclasses.replace(recipe, **changes), *tensors)}


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    models.register_family("ToyForCausalLM", "tests.models.toy_family")
    monkeypatch.setattr(toy_family, "weight_table", table)
    yield
    del models.FAMILIES["ToyForCausalLM"]


def write(folder: Path, **changes: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {"toy.embed": rng.standard_normal((VOCAB, WIDTH)).astype(np.float32)}
    for layer in range(LAYERS):
        tensors[f"toy.{layer}.qkv.values"] = rng.integers(-128, 128, SHAPE).astype(np.int8)
        tensors[f"toy.{layer}.qkv.scales"] = rng.random(SHAPE[0]).astype(np.float32)
    tensors |= changes
    save_file(tensors, folder / "model.safetensors")
    config = {"architectures": ["ToyForCausalLM"], "vocab_size": VOCAB, "layers": LAYERS, "heads": 1, "head_size": WIDTH}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def expected(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """float64 [L, 3·D, D]."""
    pairs = [(tensors[f"toy.{layer}.qkv.values"], tensors[f"toy.{layer}.qkv.scales"]) for layer in range(LAYERS)]
    return np.stack([values.astype(np.float64) * scales[:, None] for values, scales in pairs])


@pytest.mark.parametrize("mode", ["unroll", "scan"])
def test_two_tensors_make_one_parameter(quantised: None, tmp_path: Path, mode: str) -> None:
    """In float32, which the floats of the checkpoint are: the whole numbers of a recipe have no say in it."""
    tensors = write(tmp_path)
    model = models.load(tmp_path, layer_mode=mode, progress=False)
    blocks = model.blocks.layers
    found = blocks.qkv.kernel[...] if mode == "scan" else jnp.stack([block.qkv.kernel[...] for block in blocks])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(found, np.float64), expected(tensors), rtol=1e-6)


def test_a_share_is_cut_from_what_they_make() -> None:
    rng = np.random.default_rng(0)
    tensors = {"v": rng.integers(-128, 128, SHAPE).astype(np.int8), "s": rng.random(SHAPE[0]).astype(np.float32)}
    source = Source((("v", SHAPE), ("s", SHAPE[:1])), recipe=Recipe(shape=SHAPE, make=dequantised))
    whole = tensors["v"] * tensors["s"][:, None].astype(np.float64)
    rows, columns = np.full((6, WIDTH), np.nan, np.float32), np.full((SHAPE[0], 3), np.nan, np.float32)
    source.fill_share(rows, tensors.__getitem__, [], 0, [Piece(2, 3, 0), Piece(20, 2, 4)])
    np.testing.assert_allclose(rows, np.concatenate([whole[2:5], np.zeros((1, WIDTH)), whole[20:22]]), rtol=1e-6)
    source.fill_share(columns, tensors.__getitem__, [], 1, [Piece(5, 3, 0)])
    np.testing.assert_allclose(columns, whole[:, 5:], rtol=1e-6)


def test_a_parameter_may_be_of_whole_numbers() -> None:
    """Nibbles of two tensors, packed in one byte, as int8 parameters: nothing is cast."""
    low, high = np.arange(6, dtype=np.uint8).reshape(2, 3), np.arange(7, 13, dtype=np.uint8).reshape(2, 3)
    recipe = Recipe(shape=(2, 3), make=lambda low, high: low | high << 4, split=lambda packed: (packed & 15, packed >> 4))
    source = Source((("low", (2, 3)), ("high", (2, 3))), recipe=recipe)
    abstract = nnx.State({"packed": nnx.Param(jax.ShapeDtypeStruct((2, 3), jnp.uint8))})
    loaded = load_into(abstract, {"packed": source}, {"low": low, "high": high}.__getitem__, progress=False)["packed"][...]
    assert loaded.dtype == jnp.uint8
    np.testing.assert_array_equal(loaded, np.array([[112, 129, 146], [163, 180, 197]]))
    back = source.split(loaded)
    np.testing.assert_array_equal(back["low"], low)
    np.testing.assert_array_equal(back["high"], high)
    with pytest.raises(TypeError, match="Cannot cast array data from dtype"):
        source.fill(np.empty((2, 3), np.uint8), {"low": low, "high": high.astype(np.uint16)}.__getitem__, [])


def test_bad_tensors_are_named(quantised: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    scales = np.ones(SHAPE[0], np.float32)
    scales[4] = np.nan
    write(tmp_path, **{"toy.1.qkv.scales": scales})
    models.load(tmp_path, progress=False)
    assert f"toy.1.qkv.values and toy.1.qkv.scales ({WIDTH} of {3 * WIDTH * WIDTH})" in caplog.text
    write(tmp_path, **{"toy.1.qkv.scales": np.ones(5, np.float32)})
    with pytest.raises(CheckpointError, match=re.escape("wrong shape: toy.1.qkv.scales is [5], but the config says [24]")):
        models.load(tmp_path, progress=False)
    write(tmp_path, **{"toy.1.qkv.values": np.ones(SHAPE, bool)})
    with pytest.raises(UnsupportedError, match=r"the types of tensors toy\.1\.qkv\.values \(bool\) are not among"):
        models.load(tmp_path, progress=False)
    write(tmp_path, **{"toy.embed": np.ones((VOCAB, WIDTH), np.int8)})  # no recipe's tensor
    with pytest.raises(UnsupportedError, match=r"the types of tensors toy\.embed \(int8\) are not among"):
        models.load(tmp_path, progress=False)
    write(tmp_path)
    monkeypatch.setattr(toy_family, "weight_table", lambda config: table(config, make=lambda values, scales: values[:5]))
    with pytest.raises(CheckpointError, match=re.escape("toy.0.qkv.values and toy.0.qkv.scales make [5, 8], but the parameter is [24, 8]")):
        models.load(tmp_path, progress=False)


def test_what_needs_an_inverse_says_so(quantised: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = write(tmp_path)
    model = models.load(tmp_path, progress=False)
    message = r"tensors toy\.0\.qkv\.values, toy\.0\.qkv\.scales can't be made of their parameter: the recipe has no inverse"
    with pytest.raises(UnsupportedError, match=message):
        models.to_hf_state(model)
    for format in ("safetensors", "orbax"):
        with pytest.raises(UnsupportedError, match=r"by a recipe: blocks\.0\.qkv\.kernel, blocks\.1\.qkv\.kernel"):
            convert(tmp_path, tmp_path / format, format=format, progress=False)

    def split(kernel: Any) -> tuple[Any, Any]:
        scales = tensors["toy.0.qkv.scales"]
        return np.round(np.asarray(kernel) / scales[:, None]).astype(np.int8), scales

    monkeypatch.setattr(toy_family, "weight_table", lambda config: table(config, split=split))
    np.testing.assert_array_equal(models.to_hf_state(model)["toy.0.qkv.values"], tensors["toy.0.qkv.values"])
