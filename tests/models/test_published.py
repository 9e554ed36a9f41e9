"""The published models' configurations, without their weights: parameters counted and named as transformers has them.

published.json has each config.json's fields and the parameter count that its authors or the hub state, written down from public facts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest
import torch
import transformers
from flax import nnx

from pjax import models
from pjax.checkpoints.weights import expand

PUBLISHED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))


def on_meta(config: dict[str, Any]) -> torch.nn.Module:
    """transformers' model without memory."""
    fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    made = transformers.AutoConfig.for_model(config["model_type"], **fields)
    with torch.device("meta"):
        model: torch.nn.Module = getattr(transformers, config["architectures"][0])(made)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configuration(name: str) -> None:
    """Built abstractly from the config as it is published; every parameter is counted once where heads are tied."""
    hf, count = PUBLISHED[name]["config"], PUBLISHED[name]["num_parameters"]
    family = models.find_family(hf)
    config = family.Config.from_hf(hf)
    abstract = nnx.state(nnx.eval_shape(lambda: family.Model(config)), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == count

    theirs = on_meta(hf)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count
    buffers = {buffer for buffer, _ in theirs.named_buffers()}
    wanted = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items() if key not in buffers}
    if config.tied:
        assert wanted.pop("lm_head.weight") == wanted[_embedding(theirs)]
    sources = expand(family.weight_table(config), config.num_layers)
    parts = [part for source in sources.values() for part in source.parts]
    assert len(parts) == len(dict(parts)), "a tensor belongs to one parameter"
    assert dict(parts) == wanted
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(abstract)}
    assert {path.replace("blocks.", "blocks.layers.", 1): source.shape for path, source in sources.items()} == shapes


def _embedding(model: Any) -> str:
    """The name of the embedding's weight."""
    table = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is table)
