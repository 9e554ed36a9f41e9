"""Checkpoints against files written by safetensors, torch and gguf themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from pjax.checkpoints import open_checkpoint
from pjax.checkpoints.gguf_types import BLOCKS, GGUFType
from pjax.errors import CheckpointError, UnsupportedError

RNG = np.random.default_rng(0)
LLAMA: dict[str, Any] = {
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def normal(*shape: int) -> np.ndarray:
    """float32 normal values."""
    return RNG.standard_normal(shape, dtype=np.float32)


def write_folder(path: Path, tensors: dict[str, np.ndarray], name: str = "model.safetensors") -> Path:
    """A folder with a config and one safetensors file."""
    (path / "config.json").write_text('{"model_type": "llama"}')
    safetensors.numpy.save_file(tensors, path / name)
    return path


def write_index(path: Path, weight_map: dict[str, str]) -> None:
    """model.safetensors.index.json."""
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_gguf(
    path: Path, tensors: dict[str, tuple[np.ndarray, Type]], fields: dict[str, Any] = LLAMA, arch: str = "llama", big_endian: bool = False
) -> Path:
    """A GGUF file; the arrays are stored as they are, as bytes of the type."""
    order = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, arch, endianess=order)
    for key, value in fields.items():
        getattr(writer, {int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}[type(value)])(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


EMBEDDING = {"token_embd.weight": (normal(32, 256), Type.F32)}


def test_safetensors_single(tmp_path: Path) -> None:
    tensors = {
        "a.weight": normal(3, 5),
        "b.weight": normal(7).astype(np.float16),
        "c.weight": normal(2, 3, 4).astype(ml_dtypes.bfloat16),
        "empty": normal(0, 4),
    }
    write_folder(tmp_path, tensors)
    with open_checkpoint(str(tmp_path)) as checkpoint:
        assert (checkpoint.format, checkpoint.path) == ("safetensors", tmp_path)
        assert checkpoint.hf_config() == {"model_type": "llama"}
        assert checkpoint.generation_config() == {}
        assert checkpoint.names() == {name: array.shape for name, array in tensors.items()}
        read = {name: checkpoint.read(name) for name in checkpoint.names()}
        with pytest.raises(CheckpointError, match=r"has no tensor nothing"):
            checkpoint.read("nothing")
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert open_checkpoint(tmp_path).generation_config() == {"eos_token_id": [1, 2]}


def test_safetensors_written_by_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors = {"bf16": torch.randn(5, 6).bfloat16(), "f16": torch.randn(3).half(), "f32": torch.randn(2, 2), "int": torch.arange(3)}
    tensors["bool"] = torch.ones(3, dtype=torch.bool)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(tmp_path) as checkpoint:
        for name in ("bf16", "f16", "f32"):
            np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), tensors[name].float().numpy())
        assert checkpoint.read("bf16").dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(checkpoint.read("int"), [0, 1, 2])
        with pytest.raises(
            UnsupportedError, match=r"model.safetensors: tensor bool is bool; supported: float64, float32, float16, bfloat16, int8"
        ):
            checkpoint.read("bool")


def test_safetensors_sharded(tmp_path: Path) -> None:
    tensors = {"a": normal(2, 3), "b": normal(4).astype(ml_dtypes.bfloat16)}
    write_folder(tmp_path, {"a": tensors["a"]}, "one.safetensors")
    write_folder(tmp_path, {"b": tensors["b"]}, "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names() == {name: array.shape for name, array in tensors.items()}
        assert checkpoint.dtypes() == {"a": "float32", "b": "bfloat16"}
        for name, array in tensors.items():
            np.testing.assert_array_equal(checkpoint.read(name), array)
    write_folder(tmp_path, {"a": normal(2, 3), "b": tensors["b"]}, "two.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a is in .*one\.safetensors and in .*two\.safetensors, but must be in one file"):
        open_checkpoint(tmp_path)


def test_index_with_a_name_twice(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": normal(2)}, "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is not readable as JSON: a is there twice"):
        open_checkpoint(tmp_path)


def test_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--owner--name" / "snapshots" / "abc", tmp_path / "models--owner--name" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    values = {"a": normal(2)}
    write_folder(snapshot, values)
    (snapshot / "model.safetensors").rename(blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")  # as the hub's cache does
    np.testing.assert_array_equal(open_checkpoint(snapshot).read("a"), values["a"])
    (snapshot / "two.safetensors").symlink_to("model.safetensors")
    (snapshot / "model.safetensors").unlink()
    (tmp_path / "elsewhere").write_bytes((blobs / "0123").read_bytes())
    (snapshot / "one.safetensors").symlink_to(tmp_path / "elsewhere")
    write_index(snapshot, {"a": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"one\.safetensors leads to .*elsewhere, outside its folder; put the file itself there"):
        open_checkpoint(snapshot)
    write_index(snapshot, {"a": "two.safetensors"})  # a link to nothing
    with pytest.raises(CheckpointError, match=r"has no two\.safetensors, which model\.safetensors\.index\.json names"):
        open_checkpoint(snapshot)
    (snapshot / "three.safetensors").mkdir()
    write_index(snapshot, {"a": "three.safetensors"})
    with pytest.raises(CheckpointError, match=r"three\.safetensors is no file"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "gone.safetensors"}, r"has no gone\.safetensors, which model\.safetensors\.index\.json names"),
        ({"a": "../one.safetensors"}, r"index\.json points outside its folder: '\.\./one\.safetensors'"),
        ({"a": ".."}, r"points outside its folder: '\.\.'"),
        ({"a": "/etc/passwd"}, r"points outside its folder: '/etc/passwd'"),
        ({"a": "one.safetensors", "z": "one.safetensors"}, r"names 1 tensors that its files do not have: z in one\.safetensors"),
        ({"a": 3}, r"index\.json has no weight_map"),
    ],
)
def test_bad_index(tmp_path: Path, weight_map: dict[str, Any], message: str) -> None:
    write_folder(tmp_path, {"a": normal(2)}, "one.safetensors")
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_truncated_safetensors(tmp_path: Path) -> None:
    file = write_folder(tmp_path, {"a": normal(8, 8), "b": normal(8)}) / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 4, 8, 20, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged, truncated or no safetensors file"):
            open_checkpoint(tmp_path)
    file.write_bytes((1 << 60).to_bytes(8, "little") + whole[8:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        open_checkpoint(tmp_path)


def test_wrong_folders_and_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"has no weights: neither model\.safetensors nor .* nor pytorch_model\.bin\.index\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "tf_model.h5").write_bytes(b"")
    with pytest.raises(UnsupportedError, match=r"has tf_model\.h5; supported: model\.safetensors, pytorch_model\.bin and GGUF"):
        open_checkpoint(tmp_path)
    write_folder(tmp_path, {"a": normal(1)})
    for text, message in (("[]", r"config\.json holds a JSON list"), ("{", r"config\.json is not readable as JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path).hf_config()
    for name in (str(tmp_path / "nothing"), "nothing.gguf", "./a/b", "word"):
        with pytest.raises(CheckpointError, match=r"does not exist; give a folder, a \.gguf file or a hub id"):
            open_checkpoint(name)
    with pytest.raises(CheckpointError, match=r"is a file, but must be"):
        open_checkpoint(tmp_path / "config.json")


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils._paths import filter_repo_objects

    write_folder(tmp_path, {"a": normal(1)})
    files = ["config.json", "tokenizer.model", "merges.txt", "model-00001-of-00002.safetensors", "chat_template.jinja"]
    bins = ["pytorch_model-00001-of-00002.bin"]
    others = ["training_args.bin", "consolidated.safetensors", "onnx/model.json", "original/params.json"]
    fetched: list[list[str]] = []

    def snapshot_download(repo: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        if repo != "owner/model":
            raise RuntimeError("no network")
        objects = filter_repo_objects(files + bins + others, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        fetched.append(list(objects))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_checkpoint("owner/model").path == tmp_path
    assert fetched == [files]
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint("owner/model").format == "torch"
    assert fetched == [files, files, files + bins]
    with pytest.raises(CheckpointError, match=r"owner/other is neither a local path nor can it be downloaded from the hub: no network"):
        open_checkpoint("owner/other")


def test_gguf_tensors(tmp_path: Path) -> None:
    values = normal(33, 256)  # an odd number of rows: chunks don't divide it
    stored = {
        kind: quantize(values, kind) for kind in (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1)
    }
    for kind in (Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K):  # gguf can't quantise these: any bytes with finite scales
        row_bytes = 256 // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
        stored[kind] = RNG.integers(0, 60, (33, row_bytes), dtype=np.uint8)
    path = write_gguf(tmp_path / "a.gguf", {kind.name: (data, kind) for kind, data in stored.items()})
    expected_dtype = {Type.F16: np.dtype(np.float16), Type.BF16: np.dtype(ml_dtypes.bfloat16)}
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.format, checkpoint.path, checkpoint.generation_config()) == ("gguf", path, {})
        assert checkpoint.names() == {kind.name: (33, 256) for kind in stored}
        for kind, data in stored.items():
            array = checkpoint.read(kind.name)
            assert array.dtype == expected_dtype.get(kind, np.dtype(np.float32))
            np.testing.assert_array_equal(array.astype(np.float32), dequantize(data, kind))
        np.testing.assert_array_equal(checkpoint.read("F32"), values)
        np.testing.assert_allclose(checkpoint.read("Q8_0"), values, atol=0.02)
        with pytest.raises(CheckpointError, match=r"a\.gguf has no tensor nothing"):
            checkpoint.read("nothing")


def test_gguf_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pjax.checkpoints.quantised.CHUNK_ELEMENTS", 1000)  # 15 rows of 64 at once
    data, line = quantize(normal(5, 7, 64), Type.Q8_0), quantize(normal(96), Type.Q8_0)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", {"x": (data, Type.Q8_0), "line": (line, Type.Q8_0)}))
    np.testing.assert_array_equal(checkpoint.read("x"), dequantize(data, Type.Q8_0))
    np.testing.assert_array_equal(checkpoint.read("line"), dequantize(line, Type.Q8_0))
    rows = checkpoint.rows("x")
    assert (len(rows), rows.shape, rows.size, rows.dtype) == (5, (5, 7, 64), 5 * 7 * 64, np.float32)
    for index in (slice(1, 4), slice(4, None), slice(2, 2), slice(None, None, 2), (slice(None), 3), 2):
        np.testing.assert_array_equal(rows[index], dequantize(data, Type.Q8_0)[index])
    np.testing.assert_array_equal(rows.T, dequantize(data, Type.Q8_0).T)


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind.name not in ("F32", "F16", "BF16")], ids=lambda kind: kind.name)
def test_every_gguf_type_is_dequantised_as_the_gguf_package_does(kind: GGUFType, tmp_path: Path) -> None:
    theirs = Type(kind)
    assert BLOCKS[kind] == gguf.GGML_QUANT_SIZES[theirs]
    block, size = BLOCKS[kind]
    data = RNG.integers(0, 60, (3, 512 // block * size), dtype=np.uint8)
    if kind.name == "F64":
        data = normal(3, 512).astype(np.float64).view(np.uint8)
    array = open_checkpoint(write_gguf(tmp_path / "a.gguf", {"x": (data, theirs)})).read("x")
    expected = data.view(np.float64) if kind.name == "F64" else dequantize(data, theirs)
    np.testing.assert_array_equal(array, expected)
    assert array.shape == (3, 512)


def test_all_types_that_the_gguf_package_dequantises_are_read() -> None:
    """But NVFP4, whose scale for the tensor is a tensor of its own."""
    from gguf.quants import _type_traits

    assert {kind.name for kind in _type_traits} - {kind.name for kind in BLOCKS} == {"NVFP4"}


@pytest.mark.parametrize("kind", [Type.I8, Type.Q8_K], ids=lambda kind: kind.name)
def test_gguf_unsupported_type(kind: Type, tmp_path: Path) -> None:
    data = np.zeros((1, 256 // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    path = write_gguf(tmp_path / "a.gguf", {"x": (data.view(np.int8) if kind == Type.I8 else data, kind)})
    with pytest.raises(UnsupportedError, match=rf"a\.gguf: tensor x is {kind.name}; supported: F32, F16, BF16, F64, Q8_0, Q4_0"):
        open_checkpoint(path).read("x")
    path = write_gguf(tmp_path / "b.gguf", {"x": (data.view(np.int8) if kind == Type.I8 else data, kind)}, {}, arch="gemma")
    with pytest.raises(UnsupportedError, match=r"b\.gguf: GGUF architecture 'gemma' is not supported; supported: llama"):
        open_checkpoint(path)


def test_gguf_config(tmp_path: Path) -> None:
    config = open_checkpoint(write_gguf(tmp_path / "a.gguf", EMBEDDING)).hf_config()
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 128,
        "vocab_size": 32,
        "rms_norm_eps": pytest.approx(1e-5),
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    biases = {name: (normal(4), Type.F32) for name in ("blk.0.attn_q.bias", "blk.0.ffn_up.bias", "output.weight")}
    config = open_checkpoint(write_gguf(tmp_path / "b.gguf", EMBEDDING | biases)).hf_config()
    assert (config["attention_bias"], config["mlp_bias"], config["tie_word_embeddings"]) == (True, True, False)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"type": "none", "factor": 4.0}, None),
        ({"type": "linear", "factor": 0.0}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        ),
    ],
)
def test_gguf_rope_scaling(tmp_path: Path, fields: dict[str, Any], expected: dict[str, Any] | None) -> None:
    scaling = {f"llama.rope.scaling.{key}": value for key, value in fields.items()}
    assert open_checkpoint(write_gguf(tmp_path / "a.gguf", EMBEDDING, LLAMA | scaling)).hf_config()["rope_scaling"] == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type is 'longrope'; supported: none, linear, yarn"),
        ({"llama.expert_count": 8}, r"llama\.expert_count is 8; supported: dense"),
        ({"llama.rope.dimension_count": 32}, r"llama\.rope\.dimension_count is 32; supported: the head size 64"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"llama\.attention\.head_count_kv is \[2, 1\], one a layer"),
        ({"llama.logit_scale": 2.0}, r"does not apply: llama\.logit_scale=2\.0"),
    ],
)
def test_gguf_unsupported_fields(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "a.gguf", EMBEDDING, LLAMA | fields)
    with pytest.raises(UnsupportedError, match=rf"a\.gguf.*{message}"):
        open_checkpoint(path).hf_config()


def test_gguf_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"architecture 'gemma' is not supported; supported: llama, qwen2, qwen3, gpt2, gptneox"):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", EMBEDDING, {}, arch="gemma")).hf_config()
    with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight is not Llama 3's rotary scaling"):
        open_checkpoint(write_gguf(tmp_path / "b.gguf", {**EMBEDDING, "rope_freqs.weight": (normal(32), Type.F32)})).hf_config()
    with pytest.raises(CheckpointError, match=r"has no metadata field llama\.embedding_length"):
        open_checkpoint(write_gguf(tmp_path / "c.gguf", EMBEDDING, {})).hf_config()
    with pytest.raises(CheckpointError, match=r"llama\.block_count is 'x', but must be a number"):
        open_checkpoint(write_gguf(tmp_path / "d.gguf", EMBEDDING, LLAMA | {"llama.block_count": "x"})).hf_config()
    with pytest.raises(CheckpointError, match=r"no two-dimensional tensor token_embd\.weight"):
        open_checkpoint(write_gguf(tmp_path / "e.gguf", {"x": (normal(2), Type.F32)})).hf_config()
    with pytest.raises(UnsupportedError, match=r"f\.gguf is big-endian"):
        open_checkpoint(write_gguf(tmp_path / "f.gguf", EMBEDDING, big_endian=True))


def test_damaged_gguf(tmp_path: Path) -> None:
    names = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [1.0, 2.0]}
    whole = write_gguf(tmp_path / "a.gguf", {"x": (normal(4, 8), Type.F32)}, LLAMA | names).read_bytes()
    path = tmp_path / "b.gguf"
    for size in (4, 8, 20, 24, 60, len(whole) // 2, len(whole) - 256, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"b\.gguf is damaged or truncated: .*ends at byte \d+, but the file has \d+"):
            open_checkpoint(path)
    for start in (b"", b"GG", b"GGML" + whole[4:]):
        path.write_bytes(start)
        with pytest.raises(CheckpointError, match=r"b\.gguf is no GGUF file: it begins with .*, but must begin with b'GGUF'"):
            open_checkpoint(path)
    scores = whole.index(b"tokenizer.ggml.scores") + len("tokenizer.ggml.scores") + 8  # type and element type come before the length
    path.write_bytes(whole[:scores] + (1 << 62).to_bytes(8, "little") + whole[scores + 8 :])
    with pytest.raises(CheckpointError, match=r"b\.gguf is damaged or truncated"):
        open_checkpoint(path)


def test_demo_model(demo_gguf: Path) -> None:
    with open_checkpoint(demo_gguf) as checkpoint:
        config, names = checkpoint.hf_config(), checkpoint.names()
        assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 64)
        assert (config["rope_theta"], config["tie_word_embeddings"], config["rope_scaling"]) == (100000.0, True, None)
        assert len(names) == 272
        assert names["blk.0.ffn_down.weight"] == (576, 1536)
        for name in ("blk.0.attn_norm.weight", "blk.29.ffn_down.weight"):
            array = checkpoint.read(name)
            assert (array.shape, array.dtype) == (names[name], np.dtype(np.float32))
            assert 0.01 < array.std() < 1
