"""Every configuration of every family in every format of a folder: the same parameters, bit for bit, as from its safetensors.

Those give transformers' logits and tokens (test_families.py), so the others do too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from pjax.convert import convert
from pjax.models import open_model
from tests.models import hf
from tests.models.test_families import ALL, CONFIGS


def parameters(folder: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(open_model(folder, dtype="float32").load(progress=False))]


@pytest.mark.parametrize(("family", "name"), ALL)
def test_every_format_gives_the_same_parameters(tmp_path: Path, family: str, name: str) -> None:
    model = hf.make(tmp_path / "safetensors", family, **CONFIGS[family][name])
    expected = parameters(tmp_path / "safetensors")
    for folder in ("torch", "torch, sharded"):
        (tmp_path / folder).mkdir()
        shutil.copy(tmp_path / "safetensors" / "config.json", tmp_path / folder)
    state = model.state_dict()
    torch.save(state, tmp_path / "torch" / "pytorch_model.bin")
    names = sorted(state)
    parts = {f"pytorch_model-0000{part + 1}-of-00002.bin": names[part::2] for part in range(2)}
    for file, some in parts.items():
        torch.save({key: state[key] for key in some}, tmp_path / "torch, sharded" / file)
    places = ", ".join(f'"{key}": "{file}"' for file, some in parts.items() for key in some)
    (tmp_path / "torch, sharded" / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {{{places}}}}}')
    convert(tmp_path / "torch", tmp_path / "orbax", format="orbax", progress=False)
    convert(tmp_path / "orbax", tmp_path / "safetensors, sharded", max_shard_size=20_000, progress=False)
    for folder in ("torch", "torch, sharded", "orbax", "safetensors, sharded"):
        for one, other in zip(parameters(tmp_path / folder), expected, strict=True):
            np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32), err_msg=folder)
