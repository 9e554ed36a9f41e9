"""What each device holds: its 1/N of weights and pages and what must be whole, to the byte. And how weights get there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from pjax import LLM, convert
from pjax.checkpoints import arena, weights
from pjax.models import open_model
from pjax.models.sharding import make_mesh
from tests.models import hf
from tests.tiny import write_model

D, F, V, L, H, N, K = 64, 48, 123, 2, 8, 8, 2
SIZES: dict[str, Any] = {"hidden_size": D, "intermediate_size": F, "vocab_size": V, "num_attention_heads": N, "num_key_value_heads": K}
FLOAT = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), tokenizer=False, **SIZES)


def held(arrays: Any, device: Any) -> int:
    """Bytes on a device."""
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(arrays) for shard in leaf.addressable_shards if shard.device == device)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_bytes_on_each_device(folder: Path, size: int) -> None:
    mesh = make_mesh(size)
    llm = LLM(folder, skip_tokenizer_init=True, lazy=True, progress=False, num_pages=20, page_size=4, max_model_len=64, mesh=mesh)
    own_kv = max(K // size, 1)
    layer = (N // size + 2 * own_kv) * H * D + N // size * H * D + 3 * F // size * D + 2 * D
    vocab = 2 * -(-V // size) * D
    for device in mesh.devices.flat:
        assert held(llm.engine.params, device) == FLOAT * (L * layer + vocab + D)
        assert held(llm.engine.runner._pages, device) == FLOAT * L * 20 * 4 * 2 * own_kv * H
    assert llm.engine.runner.params[0].sharding.mesh.shape["model"] == size


@pytest.mark.parametrize("family", ["GPTNeoX", "GPT2", "OPT"])
def test_bytes_of_other_families(tmp_path: Path, family: str) -> None:
    """All but the norms, the biases after a sum over devices, and the table of positions is divided by 4."""
    hf.make(tmp_path, family, vocab_size=120)
    whole = open_model(tmp_path, dtype="float32").load(progress=False)
    divided = open_model(tmp_path, dtype="float32", mesh=make_mesh(4)).load(progress=False)
    names = {".".join(map(str, path)): leaf[...].nbytes for path, leaf in nnx.to_flat_state(whole)}
    kept = ("norm.scale", "norm.bias", "out.bias", "down.bias", "positions.table")
    expected = sum(size if name.endswith(kept) else size // 4 for name, size in names.items())
    assert held(divided, jax.devices()[3]) == expected


def test_no_more_of_a_tensor_is_read_than_a_share(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host makes for the mesh are shares, one parameter at a time; rows of other shares are not copied."""
    made, copied = list[tuple[int, ...]](), list[int]()
    empty, copy = arena.aligned_empty, weights.copy_and_check

    def aligned_empty(shape: Any, dtype: Any) -> np.ndarray:
        made.append(tuple(shape))
        return empty(shape, dtype)

    def copy_and_check(target: np.ndarray, array: np.ndarray) -> int:
        copied.append(array.size)
        return copy(target, array)

    monkeypatch.setattr("pjax.models.sharding.aligned_empty", aligned_empty)
    monkeypatch.setattr(weights, "copy_and_check", copy_and_check)
    state = open_model(folder, dtype="float32", mesh=make_mesh(8)).load(progress=False)
    assert max(map(np.prod, made)) == max(D * -(-V // 8), (N // 8 + 2) * H * D, 2 * F // 8 * D)
    tensors = load_file(folder / "model.safetensors")
    repeated = sum(tensor.size for name, tensor in tensors.items() if "k_proj" in name or "v_proj" in name) * 3  # for 4 devices each
    assert sum(copied) == sum(tensor.size for tensor in tensors.values()) + repeated
    assert len(jax.tree.leaves(state)) == 3 + 6 * L


def test_what_a_share_holds(folder: Path) -> None:
    """Four devices have each their own queries and, two by two, a KV head; queries, then keys, then values."""
    tensors = load_file(folder / "model.safetensors")
    params = open_model(folder, dtype="float32", mesh=make_mesh(4), layer_mode="scan").load(progress=False)
    kernel = params["blocks"]["layers"]["attention"]["qkv"]["kernel"][...]
    for shard in kernel.addressable_shards:
        device = shard.device.id
        for layer in range(L):
            q, k, v = (tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv")
            head = device // 2
            own = [q[device * 2 * H : (device + 1) * 2 * H], k[head * H : (head + 1) * H], v[head * H : (head + 1) * H]]
            np.testing.assert_array_equal(np.asarray(shard.data)[layer], np.concatenate(own))


def test_other_formats_and_types_give_the_same_shares(folder: Path, tmp_path: Path) -> None:
    convert.convert(folder, tmp_path / "orbax", format="orbax", progress=False)
    mesh = make_mesh(2)
    for dtype in ("float32", "bfloat16"):
        one, other = (open_model(path, dtype=dtype, mesh=mesh).load(progress=False) for path in (folder, tmp_path / "orbax"))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert a.dtype == b.dtype == dtype and a.sharding == b.sharding
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_a_nan_in_a_share_is_named(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_model(tmp_path, tokenizer=False, **SIZES)
    tensors = dict(load_file(tmp_path / "model.safetensors"))
    tensors["model.layers.1.self_attn.q_proj.weight"][-1, 5] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        open_model(tmp_path, dtype="float32", mesh=make_mesh(2)).load(progress=False)
    assert "model.layers.1.self_attn.q_proj.weight (1 of 2048 in one device's share)" in caplog.text
