"""Conversion between all formats: equal parameters and tokens, and interruptions that leave nothing that looks whole."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch
from flax import nnx

from pjax import LLM, CheckpointError, ConfigError, SamplingParams
from pjax.checkpoints import open_checkpoint, writers
from pjax.convert import convert, verify
from pjax.models import open_model
from pjax.text.loading import load_tokenizer
from tests.tiny import write_model

ROOT = Path(__file__).resolve().parents[1]
SHARD = 20_000  # bytes: several shards of the tiny model


def as_torch(folder: Path) -> Path:
    """The same folder with pytorch_model.bin."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def parameters(model: Path, dtype: str = "auto", layer_mode: str = "unroll") -> list[np.ndarray]:
    """Every parameter, in the order of the tree."""
    source = open_model(model, dtype=dtype, layer_mode=layer_mode)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(source.load(progress=False))]


def assert_same(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    """Equal types and bits."""
    assert [(a.dtype, a.shape) for a in one] == [(b.dtype, b.shape) for b in other]
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"))


@pytest.fixture(scope="module", params=["safetensors", "torch", "orbax"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in each format that conversion starts from."""
    folder = write_model(tmp_path_factory.mktemp("source") / "model", num_hidden_layers=3)
    if request.param == "torch":
        return as_torch(folder)
    return convert(folder, folder.with_name("orbax"), format="orbax", progress=False) if request.param == "orbax" else folder


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that `source` has."""
    return write_model(tmp_path_factory.mktemp("truth") / "model", num_hidden_layers=3)


@pytest.mark.parametrize("format", writers.FORMATS)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_every_format_to_every_format(source: Path, truth: Path, format: str, dtype: str, tmp_path: Path) -> None:
    made = convert(source, tmp_path / "made", format=format, dtype=dtype, max_shard_size=SHARD, progress=False)
    assert made == tmp_path / "made"
    assert len(list(made.glob("params-*" if format == "orbax" else "model-*.safetensors"))) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
    verify(made)
    with open_checkpoint(made) as checkpoint:
        assert checkpoint.format == format
        assert checkpoint.hf_config()["torch_dtype"] == ("float32" if dtype == "auto" else dtype)
        assert set(checkpoint.dtypes().values()) == {"float32" if dtype == "auto" else dtype}
        original = safetensors.numpy.load_file(truth / "model.safetensors")
        assert checkpoint.names() == {name: array.shape for name, array in original.items()}
        for name, array in original.items():
            np.testing.assert_array_equal(checkpoint.read(name), array.astype(checkpoint.read(name).dtype))
    assert_same(parameters(made), parameters(truth, dtype))
    assert load_tokenizer(made).encode("héllo <s>") == load_tokenizer(truth).encode("héllo <s>")
    assert load_tokenizer(made).chat_template == load_tokenizer(truth).chat_template


def test_safetensors_are_read_by_others(truth: Path, tmp_path: Path) -> None:
    import transformers

    made = convert(truth, tmp_path / "made", max_shard_size=SHARD, progress=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made).state_dict()
    for name, array in safetensors.numpy.load_file(truth / "model.safetensors").items():
        np.testing.assert_array_equal(theirs[name].numpy(), array)
    single = convert(truth, tmp_path / "single", progress=False)
    assert sorted(path.name for path in single.iterdir()) == [
        *("SHA256SUMS", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=single, capture_output=True, text=True, check=True)
    assert done.stdout.count(": OK") == 4


def test_equal_tokens(truth: Path, tmp_path: Path) -> None:
    folders = [truth, *(convert(truth, tmp_path / name, format=name, max_shard_size=SHARD, progress=False) for name in writers.FORMATS)]
    made = []
    for folder in folders:
        llm = LLM(folder, max_model_len=64, max_num_seqs=2, num_pages=16, lazy=True, progress=False)
        outputs = llm.generate(["Hello", "abc"], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
        made.append([output.outputs[0].token_ids for output in outputs])
        llm.engine.close()
    assert made[0] == made[1] == made[2]
    assert [len(ids) for ids in made[0]] == [12, 12]


def test_gguf(demo_gguf: Path, tmp_path: Path) -> None:
    made = convert(demo_gguf, tmp_path / "made", format="orbax", dtype="bfloat16", max_shard_size=100 << 20, progress=False)
    assert len(list(made.glob("params-*"))) == 3
    source, converted = open_model(demo_gguf, dtype="bfloat16"), open_model(made, dtype="auto")
    assert (source.config, source.dtype) == (converted.config, converted.dtype)
    ours, theirs = load_tokenizer(made), load_tokenizer(demo_gguf)
    text = "<|im_start|>user\n12 Ünïts of gravity’s\n\n  <|im_end|>"
    assert ours.encode(text) == theirs.encode(text)
    assert (ours.chat_template, ours.special_tokens) == (theirs.chat_template, {**theirs.special_tokens})
    assert set(converted.eos_token_ids) | set(ours.eos_token_ids) == set(source.eos_token_ids) | set(theirs.eos_token_ids)
    for a, b in zip(jax.tree.leaves(source.load(progress=False)), jax.tree.leaves(converted.load(progress=False)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint16), np.asarray(b).view(np.uint16))


def test_stacked_layers_and_other_types_from_orbax(truth: Path, tmp_path: Path) -> None:
    made = convert(truth, tmp_path / "made", format="orbax", max_shard_size=SHARD, progress=False)
    for mode in ("scan", "loop"):
        for dtype in ("float32", "bfloat16", "float16"):
            assert_same(parameters(made, dtype, mode), parameters(truth, dtype, mode))


def test_orbax_itself_restores_a_group(truth: Path, tmp_path: Path) -> None:
    """Any JAX program can read what was written."""
    made = convert(truth, tmp_path / "made", format="orbax", max_shard_size=SHARD, progress=False)
    found: dict[str, np.ndarray] = {}
    for group in sorted(made.glob("params-*")):
        with ocp.PyTreeCheckpointer() as checkpointer:
            for path, array in jax.tree_util.tree_leaves_with_path(checkpointer.restore(group)):
                found[".".join(entry.key for entry in path)] = np.asarray(array)
    leaves = nnx.to_flat_state(open_model(truth, dtype="auto").load(progress=False))
    wanted = {".".join(map(str, path)).replace("blocks.layers.", "blocks."): np.asarray(leaf[...]) for path, leaf in leaves}
    assert found.keys() == wanted.keys()
    assert_same([found[key] for key in wanted], list(wanted.values()))


TWO_DEVICES = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pjax.models import open_model

mesh = Mesh(np.array(jax.devices()), ("x",))
assert mesh.size == 2
for model in sys.argv[1:]:
    source = open_model(model, dtype="float32")
    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, P("x") if leaf.ndim == 2 else P()), source.abstract)
    leaves = jax.tree.leaves(source.load(progress=False, shardings=shardings))
    plain = jax.tree.leaves(open_model(model, dtype="float32").load())
    for leaf, other, sharding in zip(leaves, plain, jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == sharding and len(leaf.addressable_shards) == 2, leaf.sharding
        assert other.sharding.device_set == {jax.devices()[0]}
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))
print("equal")
"""


def test_loading_into_shardings(truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    made = convert(truth, tmp_path / "made", format="orbax", progress=False)
    command = [sys.executable, "-c", TWO_DEVICES, str(truth), str(made)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize("format", writers.FORMATS)
def test_an_interrupted_conversion_goes_on(truth: Path, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = writers.OrbaxWriter if format == "orbax" else writers.SafetensorsWriter
    write, written = kind.write, list[str]()
    options: dict[str, Any] = {"format": format, "max_shard_size": SHARD, "progress": False}

    def counted(self: Any, path: Path, shard: writers.Shard, bad: list[str], stop_at: int | None = None) -> None:
        if len(written) == stop_at:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        write(self, path, shard, bad)
        written.append(shard.name)

    monkeypatch.setattr(kind, "write", lambda *args: counted(*args, stop_at=3))
    with pytest.raises(KeyboardInterrupt):
        convert(truth, tmp_path / "made", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["made.partial"]
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(tmp_path / "made.partial")
    first = list(written)
    damaged = tmp_path / "made.partial" / first[1]
    damaged = next(file for file in damaged.rglob("*") if file.is_file() and file.stat().st_size > 2000) if damaged.is_dir() else damaged
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    written.clear()
    monkeypatch.setattr(kind, "write", counted)
    made = convert(truth, tmp_path / "made", **options)
    assert first[1] in written and first[0] not in written and first[2] not in written
    whole = convert(truth, tmp_path / "whole", **options)
    assert_same(parameters(made), parameters(whole))
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []
    if format == "safetensors":
        assert (made / "SHA256SUMS").read_text() == (whole / "SHA256SUMS").read_text()


def test_another_source_begins_anew(truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write_model(tmp_path / "other", seed=1, num_hidden_layers=3)

    def stop(self: Any, folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writers.SafetensorsWriter, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(other, tmp_path / "made", max_shard_size=SHARD, progress=False)
    assert_same(parameters(convert(truth, tmp_path / "made", max_shard_size=SHARD, progress=False)), parameters(truth))


def test_what_is_refused(truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match=r"there exists, but must be a path where nothing is yet"):
        convert(truth, tmp_path / "there")
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"mine\.partial is not empty and has no conversion\.json"):
        convert(truth, tmp_path / "mine")
    assert (tmp_path / "mine.partial" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "busy.partial").mkdir()
    folder = os.open(tmp_path / "busy.partial", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match=r"another process is converting into .*busy\.partial"):
        convert(truth, tmp_path / "busy")
    os.close(folder)
    for options, message in (
        ({"format": "onnx"}, "format is 'onnx', but must be one of safetensors, orbax"),
        ({"dtype": "int8"}, "dtype is 'int8', but must be one of auto, float32"),
        ({"max_shard_size": 0}, "max_shard_size is 0, but must be an integer >= 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(truth, tmp_path / "new", **options)
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "nothing", tmp_path / "new")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"has 1000 bytes free, but the conversion needs \d+ more"):
        convert(truth, tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_changed_files_are_found(truth: Path, tmp_path: Path) -> None:
    made = convert(truth, tmp_path / "made", max_shard_size=SHARD, progress=False)
    file = sorted(made.glob("model-*"))[2]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=re.escape(f"{file.name} are missing or changed")):
        verify(made)
    (made / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match=r"SHA256SUMS is missing or damaged"):
        verify(made)


def test_a_cast_that_overflows_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_model(tmp_path / "model")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with caplog.at_level(logging.WARNING, "pjax"):
        convert(folder, tmp_path / "wide", dtype="bfloat16", progress=False)
        assert caplog.messages == []
        convert(folder, tmp_path / "narrow", dtype="float16", progress=False)
    assert caplog.messages == ["1 tensors have NaN or infinite values: model.norm.weight (1 of 32)"]


def test_links_of_an_orbax_folder_may_not_leave_it(truth: Path, tmp_path: Path) -> None:
    made = convert(truth, tmp_path / "made", format="orbax", progress=False)
    file = max((file for file in made.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{file.name} leads to .*elsewhere, outside its folder; put the file itself there"):
        open_model(made, dtype="auto")


DAMAGES = ["cut", "flip", "remove"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_orbax(truth: Path, tmp_path: Path, damage: str) -> None:
    made = convert(truth, tmp_path / "made", format="orbax", progress=False)
    file = max((file for file in made.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    whole = file.read_bytes()
    middle = len(whole) // 2
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(whole[:middle] + (bytes([whole[middle] ^ 1]) + whole[middle + 1 :] if damage == "flip" else b""))
    if damage == "flip":  # the weights themselves have no checksum but that of SHA256SUMS
        with pytest.raises(CheckpointError, match="their checksums do not hold"):
            verify(made)
        return
    message = r"params-00001-of-00001 is damaged or truncated: .* can't be read"
    with pytest.raises(CheckpointError, match=message):
        parameters(made)
    with pytest.raises(CheckpointError, match=message):  # weights are read beside the first compilation
        LLM(made, skip_tokenizer_init=True, progress=False, lazy=True, max_num_seqs=1).generate([[1]], use_tqdm=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"version is 2, but must be 1"),
        ({"parameters": {}}, r"has no parameters"),
        ({"parameters": {"a": {}}}, r"pjax_parameters\.json is damaged: KeyError"),
        ({"group": "../made"}, r"points outside its folder: '\.\./made'"),
        ({"group": "gone"}, r"has no gone, which pjax_parameters\.json names"),
        ({"shape": [7]}, r"do not fit together"),
        ({"dtype": "int8"}, r"dtype int8, shape .* do not fit together"),
    ],
    ids=str,
)
def test_damaged_manifest(truth: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    made = convert(truth, tmp_path / "made", format="orbax", progress=False)
    path = made / "pjax_parameters.json"
    manifest = json.loads(path.read_text())
    if set(change) <= {"version", "parameters"}:
        manifest |= change
    else:
        manifest["parameters"]["norm.scale"] |= change
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(made)


def test_script(truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = [sys.executable, str(ROOT / "scripts" / "convert.py")]
    command = [*script, str(truth), str(tmp_path / "made"), "--format", "orbax", "--dtype", "bfloat16", "--max-shard-size", "20kB"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'made'}\n"), done.stderr
    assert_same(parameters(tmp_path / "made"), parameters(truth, "bfloat16"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"pjax convert: {tmp_path / 'made'} exists, but must be a path where nothing is yet"
    done = subprocess.run([*command[:-1], "20 apples"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "'20 apples' is no size such as 5GB or 512MiB" in done.stderr) == (2, True)
