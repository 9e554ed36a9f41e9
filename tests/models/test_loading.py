"""From a checkpoint's tensors to parameters: misfits are listed by name, and the host holds little beside the parameters."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from pjax import CheckpointError, UnsupportedError
from pjax.checkpoints.copying import copy_and_check
from pjax.checkpoints.stored import DTYPES
from pjax.checkpoints.tensors import gguf_name
from pjax.convert import convert
from pjax.models import ModelSource, llama, open_model
from tests.checkpoints import gguf_files
from tests.models import hf
from tests.tiny import write_model

TORCH = "pytorch_model.bin"


def test_every_misfit_is_named_at_once(tmp_path: Path) -> None:
    tensors = load_file(write_model(tmp_path) / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"][:7].copy()
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    lines = [
        "3 tensors do not fit its config:",
        "missing: model.layers.1.mlp.up_proj.weight [48, 32]",
        "unused: model.layers.2.mlp.up_proj.weight [32]",
        "wrong shape: model.layers.0.self_attn.q_proj.weight is [7, 32], but the config says [32, 32]",
    ]
    with pytest.raises(CheckpointError, match=re.escape("\n  ".join(lines))):
        open_model(tmp_path, dtype="float32")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_hidden_layers": 10**12}, CheckpointError, "1000000000000 layers, but there are"),
        ({"architectures": 5}, CheckpointError, "architectures is 5, but must be a list of names"),
        ({"rope_scaling": "x"}, CheckpointError, "rope scaling is 'x', but must be an object"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, UnsupportedError, "rope_type is 'longrope'; supported: 'default'"),
        ({"sliding_window": 64}, UnsupportedError, "fields that pjax does not apply: sliding_window=64"),
        ({"num_key_value_heads": 3}, CheckpointError, "num_key_value_heads is 3, but must divide num_attention_heads 4"),
        ({"rms_norm_eps": 0}, CheckpointError, "rms_norm_eps is 0, but must be a number > 0"),
    ],
    ids=str,
)
def test_configs_that_do_not_fit(change: dict[str, object], error: type[Exception], message: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(error, match=re.escape(message)):
        open_model(folder, dtype="float32")


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        ({"eos_token_id": 5}, None, (5,)),
        ({"eos_token_id": 5}, {"eos_token_id": [6, 7]}, (6, 7)),
        ({"eos_token_id": 5}, {"eos_token_id": None}, (5,)),
        ({"eos_token_id": [5, 99999, -1]}, {}, (5, 99999, -1)),  # an engine drops the last two (tests/engine/test_bad_input.py)
        ({"eos_token_id": None}, None, ()),
    ],
)
def test_end_tokens_of_the_configs(
    config: dict[str, object], generation: dict[str, object] | None, ids: tuple[int, ...], tmp_path: Path
) -> None:
    path = write_model(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert open_model(tmp_path, dtype="float32").eos_token_ids == ids


@pytest.mark.parametrize("value", ["5", True, [5, None], 5.5])
def test_end_tokens_that_are_no_ids(value: object, tmp_path: Path) -> None:
    path = write_model(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"eos_token_id is .*, but must be a token id or a list of them"):
        open_model(tmp_path, dtype="float32")


MEASURE = """
import pathlib, sys, threading, time
import jax, jax.numpy as jnp, numpy as np
import tensorstore  # the library's own memory is not the checkpoint's
from pjax.models import open_model

def anonymous():
    # Pages of the mapped file are the kernel's to take back, so they do not count.
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

jnp.zeros(1000).block_until_ready()
source = open_model(sys.argv[1], dtype="float32", layer_mode="loop")
before, most, done = anonymous(), 0, threading.Event()

def watch():
    global most
    while not done.is_set():
        most = max(most, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
params = source.load(progress=False)
jax.block_until_ready(params)
done.set()
thread.join()
print(most - before, source.num_bytes, max(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def write_gguf(path: Path, folder: Path) -> Path:
    """The large model below with its matrices in Q8_0: zeros, for quantising in numpy takes long."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(path, "llama")
    for key, name in {"block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
                      "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads"}.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", config[name])
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, array in tensors.items():
        if array.ndim == 1:
            writer.add_tensor(gguf_name(llama, name), array)
        else:
            rows, columns = array.shape
            data = np.zeros((rows, columns // 32 * 34), np.uint8)
            writer.add_tensor(gguf_name(llama, name), data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 330 MiB, where one tensor more or less shows."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 8192, "num_attention_heads": 16}
    return write_model(tmp_path_factory.mktemp("large") / "model", tokenizer=False, **sizes | {"num_key_value_heads": 16})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")  # not there on macOS
@pytest.mark.parametrize("format", ["safetensors", "torch", "gguf", "orbax"])
def test_loading_takes_the_model_and_one_tensor(large_model: Path, format: str, tmp_path: Path) -> None:
    model = large_model
    if format == "torch":
        (tmp_path / "config.json").write_text((model / "config.json").read_text())
        torch.save({name: torch.from_numpy(array) for name, array in load_file(model / "model.safetensors").items()}, tmp_path / TORCH)
        model = tmp_path
    elif format == "gguf":
        model = write_gguf(tmp_path / "a.gguf", model)
    elif format == "orbax":
        model = convert(model, tmp_path / "orbax", format="orbax", progress=False)
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(model)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    grown, size, largest = map(int, result.stdout.split())
    assert size > 300 << 20
    assert grown < size + largest + (32 << 20), f"{grown >> 20} MiB for a model of {size >> 20} MiB"


def save(folder: Path, tensors: dict[str, np.ndarray], format: str) -> Path:
    """Replaces a folder's weights."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    if format == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        as_torch = {
            name: torch.from_numpy(array.astype(np.float32)).to(getattr(torch, array.dtype.name)) for name, array in tensors.items()
        }
        torch.save(as_torch, folder / TORCH)
    return folder


def loaded(source: ModelSource) -> dict[str, np.ndarray]:
    """Parameters by their paths."""
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(source.load(progress=False))}


@pytest.mark.parametrize("format", ["safetensors", "torch"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stated", ["float32", "bfloat16", None])
def test_types(tmp_path: Path, format: str, dtype: str, stated: str | None, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_model(tmp_path, torch_dtype=stated)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: array if "layers.1" in name else array.astype(np.float16) for name, array in tensors.items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(ml_dtypes.bfloat16)
    with caplog.at_level(logging.INFO, "pjax"):
        source = open_model(save(folder, tensors, format), dtype=dtype)
    chosen = dtype if dtype != "auto" else stated or "float16"
    why = "as asked" if dtype != "auto" else "as its config says" if stated else "as most of them are"
    shares = "50% float16, 25.9% bfloat16, 24.1% float32, 0.0995% float64"
    assert caplog.messages[0] == f"{tmp_path.name}: its weights are {shares}; parameters are {chosen}, {why}"
    assert source.dtype == chosen
    params = loaded(source)
    assert {array.dtype.name for array in params.values()} == {chosen}
    for path, name in {
        "norm.scale": "model.norm",
        "head.kernel": "lm_head",
        "blocks.layers.1.mlp.down.kernel": "model.layers.1.mlp.down_proj",
    }.items():
        np.testing.assert_array_equal(params[path], tensors[f"{name}.weight"].astype(chosen))


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_weights_of_whole_numbers_are_refused_before_any_is_read(tmp_path: Path, format: str) -> None:
    folder = write_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(32, np.int64)
    with pytest.raises(UnsupportedError, match=r"the types of tensors model\.norm\.weight \(int64\) are not among float64, float32"):
        open_model(save(folder, tensors, format), dtype="float32")


@pytest.mark.parametrize("layer_mode", ["unroll", "scan"])
def test_nan_and_infinite_weights_are_named(tmp_path: Path, layer_mode: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 4:6] = np.nan, np.inf
    tensors["model.norm.weight"][-1] = -np.inf
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 65536  # float16 ends at 65504
    save_file(tensors, folder / "model.safetensors")
    for dtype in ("float32", "bfloat16", "float16"):
        caplog.clear()
        params = loaded(open_model(folder, dtype=dtype, layer_mode=layer_mode))
        assert np.isneginf(params["norm.scale"][-1])
        overflown = ["model.layers.0.mlp.up_proj.weight (1 of 1536)"] if dtype == "float16" else []
        expected = [*overflown, "model.layers.1.self_attn.k_proj.weight (2 of 512)", "model.norm.weight (1 of 32)"]
        (message,) = caplog.messages
        assert message.startswith(f"{len(expected)} tensors have NaN or infinite values: ")
        assert sorted(message.split(": ")[1].split(", ")) == expected


def test_nan_and_infinite_weights_of_an_orbax_folder_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4:6] = np.nan, np.inf
    tensors["model.norm.weight"][0] = 65536  # float16 ends at 65504
    save_file(tensors, folder / "model.safetensors")
    made = convert(folder, tmp_path / "orbax", format="orbax", progress=False)
    for dtype, overflown in (("float32", []), ("bfloat16", []), ("float16", ["norm.scale (1 of 32)"])):
        caplog.clear()
        loaded(open_model(made, dtype=dtype))
        [message] = caplog.messages
        named = ["blocks.1.mlp.down.kernel (2 of 1536)", *overflown]
        assert message.startswith(f"{len(named)} tensors have NaN or infinite values: ")
        assert sorted(message.split(": ")[1].split(", ")) == named


@pytest.mark.parametrize(("kind", "infinity", "count"), [("F16", 0x7C00, 1), ("BF16", 0x7F80, 1), ("Q8_0", 0x7C00, 32)])
def test_infinite_weights_of_a_gguf_file_are_named(
    tmp_path: Path, kind: str, infinity: int, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The first two bytes: a weight, or the scale of a block of 32."""
    path = gguf_files.write_model(tmp_path / "a.gguf", hf.make(tmp_path / "hf", "Llama"), gguf.GGMLQuantizationType[kind])
    [offset] = [tensor.data_offset for tensor in gguf.GGUFReader(path).tensors if tensor.name == "output.weight"]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(infinity.to_bytes(2, "little"))
    loaded(open_model(path, dtype="float32"))
    size = hf.VOCAB * 32
    assert caplog.messages == [f"1 tensors have NaN or infinite values: lm_head.weight ({count} of {size})"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_check_finds_every_bad_value_and_no_other(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pjax.checkpoints.copying.CHUNK", 64)
    rng = np.random.default_rng(0)
    for shape in ((7,), (33, 5), (3, 4, 17), (1, 200), (0, 4)):
        array = (rng.standard_normal(shape) * 10.0 ** rng.integers(-40, 40, shape)).astype(np.float64)
        array[rng.random(shape) < 0.1] = np.nan
        target = np.empty(shape, DTYPES[dtype])
        assert copy_and_check(target, array) == np.count_nonzero(~np.isfinite(target.astype(np.float32)))
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(target.astype(np.float32), array.astype(DTYPES[dtype]).astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_float16_is_cast_as_numpy_casts_it(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pjax.checkpoints.copying.CHUNK", 1000)
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(128, 512)
    for array in (values, values.T, values[::2, ::3], values[:, None]):
        target = np.empty(array.shape, DTYPES[dtype])
        assert copy_and_check(target, array) == np.count_nonzero(~np.isfinite(array))
        bits = f"u{target.itemsize}"
        with np.errstate(invalid="ignore"):  # signalling NaN
            np.testing.assert_array_equal(target.view(bits), array.astype(DTYPES[dtype]).view(bits))


@pytest.mark.parametrize("format", ["safetensors", "torch"])
@pytest.mark.parametrize("head", ["absent", "equal", "unequal", "alone"])
def test_tied_heads_as_transformers_has_them(tmp_path: Path, head: str, format: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_model(tmp_path, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    if head == "absent":
        del tensors["lm_head.weight"]
    elif head == "equal":
        tensors["lm_head.weight"] = embedding.copy()
    elif head == "alone":
        del tensors["model.embed_tokens.weight"]
    source = open_model(save(folder, tensors, format), dtype="float32")
    params = loaded(source)
    assert source.config.tied == (head != "unequal") == ("head.kernel" not in params)
    assert caplog.messages[:1] == (
        [f"{tmp_path.name}: its config ties lm_head.weight to model.embed_tokens.weight, but the two differ: the head is used as it is"]
        if head == "unequal"
        else []
    )
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    np.testing.assert_array_equal(params["embed.table"], expected.get_input_embeddings().weight.detach().numpy())
    output = expected.get_output_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(params.get("head.kernel", params["embed.table"]), output)
