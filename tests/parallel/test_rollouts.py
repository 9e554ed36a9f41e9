"""examples/rollouts.py on two devices, with one set of parameters, and examples/rollout_worker.py in two processes: the same
log-probabilities on both sides."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

from pjax.sampling.token_rules import tables_struct
from tests.tiny import CONFIG, write_model

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, tmp_path: Path, *arguments: str) -> str:
    """What an example prints: every turn both sides agreed, and the model learned."""
    folder = write_model(tmp_path / "tiny", tokenizer=False)
    # Logits of a few units, as trained models have: float32 can tell log-probabilities to 1e-5 then.
    tensors = {name: tensor * (1 if "norm" in name else 0.5) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path),
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "examples" / name), str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    differences = [float(found) for found in re.findall(r"differ by (\S+) at most", done.stdout)]
    assert len(differences) == 8 and max(differences) < 1e-5, done.stdout
    rewards = [float(found) for found in re.findall(r"mean reward (\S+),", done.stdout)]
    assert sum(rewards[-3:]) > sum(rewards[:3]), rewards
    return done.stdout


@pytest.mark.slow
def test_rollouts(tmp_path: Path) -> None:
    printed = run("rollouts.py", tmp_path, "2")
    before, parameters, more, pages = map(int, re.findall(r" (\d+)", printed.splitlines()[0].replace(",", "").replace(";", "")))
    rules = sum(struct.size * struct.dtype.itemsize for struct in jax.tree.leaves(tables_struct(16, CONFIG["vocab_size"])))
    expected = pages + rules + 16 * 64 * 4  # the tokens of 16 requests
    assert before == parameters and expected <= more < expected + parameters / 4, printed  # no second set of parameters
    assert "the engine reads the trainer's own arrays: True" in printed


@pytest.mark.slow
def test_a_worker_in_a_process_of_its_own_samples_from_the_newest_parameters(tmp_path: Path) -> None:
    """Old parameters would be told by the differences: a turn changes log-probabilities by far more than 1e-5."""
    printed = run("rollout_worker.py", tmp_path)
    trainer, worker = re.findall(r"process (\d+), the worker (\d+)", printed)[0]
    assert trainer != worker
