"""pytorch_model.bin against torch.save; what is pickled in one is never run."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pjax.checkpoints import open_checkpoint
from pjax.checkpoints.base import Checkpoint
from pjax.errors import CheckpointError, UnsupportedError
from tests.budget import examples

NUMPY = {torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


def write_folder(path: Path, value: Any, name: str = "pytorch_model.bin", **options: Any) -> Path:
    """A folder with a config and one file of torch.save."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    torch.save(value, path / name, **options)
    return path


def same(array: np.ndarray, tensor: torch.Tensor) -> None:
    """Equal type, shape and values."""
    assert (array.dtype, array.shape) == (NUMPY[tensor.dtype], tuple(tensor.shape))
    wide = tensor.detach().double().numpy()
    np.testing.assert_array_equal(array.astype(np.float64), wide)


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of every type; some share a storage, transposed, sliced, strided, expanded."""
    found = {}
    for index in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(list(NUMPY)))
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(index)).to(dtype)
        found[f"t{index}"] = tensor
        for act in draw(st.lists(st.sampled_from(["transpose", "slice", "step", "expand", "parameter", "same"]), max_size=3)):
            if act == "transpose" and tensor.ndim > 1:
                tensor = tensor.transpose(0, -1)
            elif act == "slice" and tensor.ndim:
                tensor = tensor[1:]
            elif act == "step" and tensor.ndim:
                tensor = tensor[..., ::2]
            elif act == "expand":
                tensor = tensor.expand(3, *tensor.shape)
            elif act == "parameter":
                tensor = torch.nn.Parameter(tensor)
            found[f"t{index}.{act}"] = tensor
    return found


@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=state_dicts(), protocol=st.sampled_from([2, 3, 4, 5]), ordered=st.booleans())
def test_any_state_dict(tmp_path: Path, state: dict[str, torch.Tensor], protocol: int, ordered: bool) -> None:
    write_folder(tmp_path, OrderedDict(state) if ordered else state, pickle_protocol=protocol)
    truth = torch.load(tmp_path / "pytorch_model.bin", weights_only=False)  # its safe reading warns of protocols from 3 on
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "torch"
        assert checkpoint.names() == {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name, tensor in truth.items():
            same(checkpoint.read(name), tensor)


def test_state_dict_of_a_module(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    module.register_parameter("tied", module[0].weight)
    write_folder(tmp_path, module.state_dict())  # carries _metadata
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.names()) == {"tied", "0.weight", "0.bias", "1.weight", "1.bias"}
        for name, tensor in module.state_dict().items():
            same(checkpoint.read(name), tensor)
        assert np.shares_memory(checkpoint.read("tied"), checkpoint.read("0.weight"))


def test_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        write_folder(tmp_path, {"a": torch.arange(3.0)})
    finally:
        torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(open_checkpoint(tmp_path).read("a"), [0, 1, 2])


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "int8", "uint8"])
def test_whole_numbers(tmp_path: Path, dtype: str) -> None:
    checkpoint = open_checkpoint(write_folder(tmp_path, {"packed": torch.arange(100, 103).to(getattr(torch, dtype))}))
    found = checkpoint.read("packed")
    assert checkpoint.dtypes() == {"packed": dtype} and found.dtype == dtype
    np.testing.assert_array_equal(found, [100, 101, 102])


@pytest.mark.parametrize("dtype", ["bool", "complex64", "complex128"])
def test_types_of_no_weights(tmp_path: Path, dtype: str) -> None:
    checkpoint = open_checkpoint(write_folder(tmp_path, {"mask": torch.ones(3).to(getattr(torch, dtype)), "w": torch.ones(2)}))
    assert checkpoint.dtypes() == {"mask": dtype, "w": "float32"}
    with pytest.raises(UnsupportedError, match=rf"pytorch_model\.bin: tensor mask is {dtype}; supported: float64, float32, float16"):
        checkpoint.read("mask")
    np.testing.assert_array_equal(checkpoint.read("w"), [1, 1])


def test_shards(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(4).half()}
    write_folder(tmp_path, {"a": tensors["a"]}, "one.bin")
    write_folder(tmp_path, {"b": tensors["b"]}, "two.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin"}}))
    with open_checkpoint(tmp_path) as checkpoint:
        for name, tensor in tensors.items():
            same(checkpoint.read(name), tensor)
    index.write_text(json.dumps({"weight_map": {"a": "two.bin", "b": "two.bin"}}))
    with pytest.raises(CheckpointError, match=r"index\.json names 1 tensors that its files do not have: a in two\.bin"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../one.bin"}}))
    with pytest.raises(CheckpointError, match=r"index\.json points outside its folder: '\.\./one\.bin'"):
        open_checkpoint(tmp_path)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert (checkpoint.format, checkpoint.names()) == ("safetensors", {"a": (2,)})


def with_pickle(folder: Path, data: bytes, entries: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A torch file around a pickle of one's own."""
    (folder / "config.json").write_text("{}")
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", **options) as archive:
        archive.writestr("x/data.pkl", data)
        for name, content in (entries or {}).items():
            archive.writestr(f"x/{name}", content)
    return folder


class Calls:
    """Pickled as a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize(
    "call", [(os.system, "touch {}"), (eval, "open('{}', 'w').close()"), (exec, "open('{}', 'w').close()"), (os.mkdir, "{}")]
)
def test_pickled_code_is_not_run(tmp_path: Path, call: tuple[Callable[..., Any], Any], protocol: int) -> None:
    mark = tmp_path / "written"
    function, *arguments = call
    data = pickle.dumps({"a": Calls(function, *(text.format(mark) for text in arguments))}, protocol)
    with pytest.raises(CheckpointError, match=rf"its pickle (names '\w+\.{function.__name__}', which is neither|has the opcode)"):
        open_checkpoint(with_pickle(tmp_path, data))
    assert not mark.exists()
    pickle.loads(data)  # the attack itself works
    assert mark.exists()


def g(name: str) -> bytes:
    """The opcode that pushes a qualified name."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (g("torch.serialization load") + b"(X\x01\x00\x00\x00xtR", r"names 'torch\.serialization\.load'"),
        (g("torch._utils _rebuild_device_tensor_from_numpy") + b")R", r"names 'torch\._utils\._rebuild_device_tensor"),
        (b"\x8c\x02os\x8c\x06system\x93", r"names 'os\.system'"),
        (b"(ios\nsystem\n", r"names 'os\.system'"),
        (b"\x82\x01", r"opcode EXT1"),
        (g("collections OrderedDict") + b")\x81", r"opcode NEWOBJ"),
        (g("torch FloatStorage") + b")R", r"calls torch\.FloatStorage with arguments that do not fit"),
        (g("collections OrderedDict") + b"N}X\x01\x00\x00\x00xK\x01s\x86b", r"sets attributes of a Global"),
        (b"X\x01\x00\x00\x00xQ", r"persistent id that is no storage"),
        (b"K\x01", r"entry 'a' is a int, but must be a tensor"),
        (b"NX\x01\x00\x00\x00aNX\x01\x00\x00\x00aN", r"'a' is there twice"),
        (b"\xff", r"is damaged"),
        (b"hd", r"is damaged: KeyError"),
        (b"r\xff\xff\xff\x7f0", r"opcode POP|is damaged"),  # CPython's unpickler takes 16 GiB for this memo
    ],
)
def test_pickles_of_something_else(tmp_path: Path, body: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin.*{message}"):
        open_checkpoint(with_pickle(tmp_path, b"\x80\x02}(X\x01\x00\x00\x00a" + body + b"u."))


def tensor_pickle(*, shape: Any = (2, 3), strides: Any = (3, 1), offset: Any = 0, count: Any = 6, key: str = "0") -> bytes:
    """A state dict of one float32 tensor, with numbers of one's own."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", count) if isinstance(value, Calls) else None

        def reducer_override(self, value: Any) -> Any:
            if value is marker:
                return torch._utils._rebuild_tensor_v2, (Calls(), offset, shape, strides, False, OrderedDict())
            return NotImplemented

    marker = type("Marker", (), {})()
    file = io.BytesIO()
    Pickler(file, 2).dump({"w": marker})
    return file.getvalue()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            {"shape": (2, 4), "strides": (4, 1)},
            r"tensor w of shape \[2, 4\], strides \[4, 1\] and offset 0 ends at element 7, but .* has 6",
        ),
        ({"offset": 1}, r"ends at element 6, but its storage has 6"),
        ({"strides": (2**62, 1)}, r"ends at element 4611686018427387906"),
        ({"shape": (2**62, 2**62), "strides": (0, 0)}, r"read: .*tensor w of shape"),
        ({"shape": (2**64, 1)}, r"integers in \[0, 2\*\*63\)"),
        ({"shape": (-1, 3)}, r"integers in \[0, 2\*\*63\)"),
        ({"strides": (-3, 1)}, r"the strides of a tensor is no tuple"),
        ({"strides": (1,)}, r"which do not fit"),
        ({"shape": (1,) * 65, "strides": (1,) * 65}, r"tuple of up to 64"),
        ({"shape": ((1,), 1)}, r"the shape of a tensor is no tuple"),
        ({"offset": -1}, r"offset -1, which do not fit"),
        ({"count": 7}, r"tensor w has a storage of 7 float32, but its entry has 24 bytes"),
        ({"count": 2**70}, r"persistent id that is no storage"),
        ({"key": "1"}, r"has no entry 'data/1' \(tensor w\)"),
        ({"key": "../data.pkl"}, r"has no entry 'data/\.\./data\.pkl' \(tensor w\)"),
    ],
    ids=str,
)
def test_tensors_outside_their_storage(tmp_path: Path, numbers: dict[str, Any], message: str) -> None:
    values = np.arange(6, dtype=np.float32)

    def opened() -> Checkpoint:
        return open_checkpoint(with_pickle(tmp_path, tensor_pickle(**numbers), {"data/0": values.tobytes()}))

    if message.startswith("read: "):
        with opened() as checkpoint, pytest.raises(CheckpointError, match=message.removeprefix("read: ")):
            checkpoint.read("w")
    else:
        with pytest.raises(CheckpointError, match=message):
            opened()
    good = with_pickle(tmp_path, tensor_pickle(), {"data/0": values.tobytes(), "byteorder": b"little"})
    np.testing.assert_array_equal(open_checkpoint(good).read("w"), values.reshape(2, 3))


def test_archives_that_torch_does_not_write(tmp_path: Path) -> None:
    storage = {"data/0": bytes(24)}
    with pytest.raises(CheckpointError, match=r"entry 'data\.pkl' is compressed or encrypted, but must be stored"):
        open_checkpoint(with_pickle(tmp_path, tensor_pickle(), storage, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(UnsupportedError, match=r"pytorch_model\.bin has byte order 'big'; supported: little"):
        open_checkpoint(with_pickle(tmp_path, tensor_pickle(), storage | {"byteorder": b"big"}))
    with pytest.warns(UserWarning, match="Duplicate name"):
        with_pickle(tmp_path, tensor_pickle(), {"data.pkl": b""} | storage)
    with pytest.raises(CheckpointError, match=r"has 2 entries data\.pkl, but must have one"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"it holds a list, but must hold a dictionary of tensors"):
        open_checkpoint(with_pickle(tmp_path, b"\x80\x02]."))
    (tmp_path / "pytorch_model.bin").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is no torch file: it begins with b'GGUF'"):
        open_checkpoint(tmp_path)


def test_old_format(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError, match=r"torch's format of before version 1\.6; convert it.*torch\.save\(torch\.load\(path"):
        open_checkpoint(tmp_path)


DAMAGED = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5).half(), "t": torch.arange(12.0).reshape(3, 4).t()}


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_error_or_changes_numbers_only(tmp_path: Path, data: st.DataObject) -> None:
    path = write_folder(tmp_path, DAMAGED) / "pytorch_model.bin"
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "cut"):
        del whole[data.draw(st.integers(0, len(whole) - 1), "size") :]
    else:
        for _ in range(data.draw(st.integers(1, 3), "flips")):
            whole[data.draw(st.integers(0, len(whole) - 1), "at")] ^= data.draw(st.integers(1, 255), "bits")
    path.write_bytes(whole)
    message = "pytorch_model.bin"
    try:
        with open_checkpoint(tmp_path) as checkpoint:
            assert checkpoint.names() == {name: tuple(tensor.shape) for name, tensor in DAMAGED.items()}
            arrays = {name: checkpoint.read(name) for name in DAMAGED}
    except (CheckpointError, UnsupportedError) as error:
        arrays, message = {}, str(error)
    assert "pytorch_model.bin" in message
    changed = sum((array.astype(np.float64) != DAMAGED[name].double().numpy()).sum() for name, array in arrays.items())
    assert changed <= 3, "a flipped byte of data changes one number, and no other byte changes any"
