"""Damaged bytes anywhere in a checkpoint: an error that names the file, or data; never another exception.

Torch files have their own test.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pjax import CheckpointError, UnsupportedError
from pjax.checkpoints import open_checkpoint
from pjax.convert import convert
from pjax.models import open_model
from tests.budget import examples
from tests.tiny import write_model

ANY = settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def damages(draw: st.DrawFn) -> tuple[float, list[tuple[float, int]]]:
    """Where a file is cut (1: nowhere), and which bytes are changed how; places as shares of the file."""
    share = st.floats(0, 1, exclude_max=True)
    if draw(st.booleans()):
        return draw(share), []
    return 1.0, draw(st.lists(st.tuples(share, st.integers(1, 255)), min_size=1, max_size=3))


def damaged(whole: bytes, damage: tuple[float, list[tuple[float, int]]], head: int | None = None) -> bytes:
    """The bytes with that damage; changes fall into the first `head` bytes."""
    cut, changes = damage
    data = bytearray(whole[: int(cut * len(whole))])
    for place, bits in changes:
        data[int(place * min(len(data), head or len(data)))] ^= bits
    return bytes(data)


def read_all(path: Path) -> str:
    """Reads all that there is; "" or the message of an error that pjax raises on purpose."""
    try:
        with open_checkpoint(path) as checkpoint:
            checkpoint.hf_config()
            checkpoint.dtypes()
            for name, shape in checkpoint.names().items():
                assert checkpoint.read(name).shape == shape
    except (CheckpointError, UnsupportedError) as error:
        return str(error)
    return ""


@ANY
@given(damage=damages(), in_head=st.booleans())
def test_safetensors(tmp_path: Path, damage: tuple[float, list[tuple[float, int]]], in_head: bool) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    tensors = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(5, dtype=np.float16)}
    save_file(tensors, file)
    whole = file.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    file.unlink()  # files are mapped: a new one, not new bytes under an old map
    file.write_bytes(damaged(whole, damage, head if in_head else None))
    message = read_all(tmp_path)
    assert not message or "model.safetensors" in message
    assert message or damage[0] == 1, "a cut file is never read"


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A model of one layer's sizes, with two tensors and a few tokens."""
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("token_embd.weight", quantize(np.ones((3, 32), np.float32), kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@ANY
@given(damage=damages(), in_head=st.booleans())
def test_gguf(tmp_path: Path, small_gguf: bytes, damage: tuple[float, list[tuple[float, int]]], in_head: bool) -> None:
    path = tmp_path / "a.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(damaged(small_gguf, damage, len(small_gguf) // 2 if in_head else None))
    with np.errstate(all="ignore"):  # scales of any bits
        message = read_all(path)
    assert not message or "a.gguf" in message or "llama" in message


@settings(ANY, max_examples=examples(40))
@given(damage=damages())
@pytest.mark.parametrize("name", ["pjax_parameters.json", "config.json", "params-00001-of-00001"])
def test_orbax(tmp_path: Path, made: Path, name: str, damage: tuple[float, list[tuple[float, int]]]) -> None:
    folder = tmp_path / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    path = folder / name
    path = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size) if path.is_dir() else path
    path.write_bytes(damaged(path.read_bytes(), damage))
    with suppress(CheckpointError, UnsupportedError):
        open_model(folder, dtype="float32").load(progress=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model, in orbax."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    source = write_model(tmp_path_factory.mktemp("orbax") / "source", tokenizer=False, **sizes)
    return convert(source, source.with_name("made"), format="orbax", progress=False)
