"""From a checkpoint's tensors to parameters: misfits are listed by name, and the host holds little beside the parameters."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from pjax import CheckpointError, UnsupportedError
from pjax.models import open_model
from tests.tiny import write_model


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


MEASURE = """
import pathlib, sys, threading, time
import jax, jax.numpy as jnp, numpy as np
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_model_and_one_tensor(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 8192, "num_attention_heads": 16}
    write_model(tmp_path, tokenizer=False, **sizes | {"num_key_value_heads": 16})
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    grown, model, largest = map(int, result.stdout.split())
    assert model > 300 << 20
    assert grown < model + largest + (32 << 20), f"{grown >> 20} MiB for a model of {model >> 20} MiB"
