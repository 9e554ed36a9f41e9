"""Files with the names that are published on the hub, which differ from those that transformers saves today."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pjax import CheckpointError
from pjax.models import open_model
from tests.models import hf
from tests.models.test_families import logits_of

State = dict[str, torch.Tensor]
MASK = torch.tril(torch.ones(128, 128)).view(1, 1, 128, 128)


def without(prefix: str, state: State) -> State:
    """A state dict of the model below the head, as its own class saves it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def per_layer(form: str, tensor: torch.Tensor, num_layers: int = 2) -> State:
    """The same buffer in every layer."""
    return {form.format(layer): tensor.clone() for layer in range(num_layers)}


def gpt2(state: State) -> State:
    """gpt2, gpt2-xl: no `transformer.`, no head, the causal mask as a buffer."""
    return without("transformer.", state) | per_layer("h.{}.attn.bias", MASK)


def gpt2_with_head(state: State) -> State:
    """distilgpt2 and many fine-tuned ones: both buffers, and the tied head stored again."""
    masked = per_layer("transformer.h.{}.attn.masked_bias", torch.tensor(-1e4))
    return state | per_layer("transformer.h.{}.attn.bias", MASK.bool()) | masked | {"lm_head.weight": state["transformer.wte.weight"]}


def opt(state: State) -> State:
    """opt-125m … opt-66b: from the class without a head."""
    return without("model.", state)


def opt_with_head(state: State) -> State:
    """opt-350m: `model.decoder.` and the tied head stored again."""
    return state | {"lm_head.weight": state["model.decoder.embed_tokens.weight"]}


def neox(state: State) -> State:
    """pythia, dolly-v2, gpt-neox-20b: transformers 4's name of the head, masks and frequencies as buffers."""
    state = {name.replace("lm_head.", "embed_out."): tensor for name, tensor in state.items()}
    masked = per_layer("gpt_neox.layers.{}.attention.masked_bias", torch.tensor(-1e9))
    frequencies = per_layer("gpt_neox.layers.{}.attention.rotary_emb.inv_freq", torch.rand(1))
    return state | per_layer("gpt_neox.layers.{}.attention.bias", MASK.to(torch.uint8)) | masked | frequencies


def llama(state: State) -> State:
    """llama-7b, Llama-2-7b: the frequencies as a buffer."""
    return state | per_layer("model.layers.{}.self_attn.rotary_emb.inv_freq", torch.rand(4))


PUBLISHED: list[tuple[str, Callable[[State], State]]] = [
    ("GPT2", gpt2),
    ("GPT2", gpt2_with_head),
    ("OPT", opt),
    ("OPT", opt_with_head),
    ("GPTNeoX", neox),
    ("Llama", llama),
]


def rewrite(folder: Path, format: str, change: Callable[[State], State], model: torch.nn.Module) -> None:
    """Replaces the folder's weights; `transformers` saved the tied head once, as published files may or may not."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False):
        del state["lm_head.weight"]
    state = {name: tensor.clone() for name, tensor in change(state).items()}
    (folder / "model.safetensors").unlink()
    if format == "torch":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("format", ["torch", "safetensors"])
@pytest.mark.parametrize(("family", "change"), PUBLISHED, ids=lambda value: getattr(value, "__name__", value))
def test_published_names(family: str, change: Callable[[State], State], format: str, tmp_path: Path) -> None:
    model = hf.make(tmp_path, family)
    rewrite(tmp_path, format, change, model)
    tokens = np.random.default_rng(2).integers(0, hf.VOCAB, (2, 40)).tolist()
    np.testing.assert_allclose(logits_of(tmp_path, tokens), hf.torch_logits(model, tokens), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("family", "change", "name"),
    [
        ("GPT2", gpt2, "h.0.attn.other_bias"),
        ("GPT2", gpt2, "score.weight"),
        ("OPT", opt, "decoder.version"),
        ("OPT", opt_with_head, "model.decoder.layers.0.self_attn.bias"),
        ("GPTNeoX", neox, "gpt_neox.layers.0.attention.rotary_emb.cos_cached"),
        ("Llama", llama, "model.layers.0.self_attn.bias"),
    ],
)
def test_other_leftovers_are_errors(family: str, change: Callable[[State], State], name: str, tmp_path: Path) -> None:
    model = hf.make(tmp_path, family)
    rewrite(tmp_path, "torch", lambda state: change(state) | {name: torch.ones(3)}, model)
    with pytest.raises(CheckpointError, match=r"1 tensors do not fit its config:\n  unused: " + re.escape(name) + r" \[3\]$"):
        open_model(tmp_path, dtype="float32")


@pytest.mark.parametrize("family", ["GPT2", "OPT", "GPTNeoX"])
def test_a_name_with_and_without_its_prefix_is_an_error(family: str, tmp_path: Path) -> None:
    """Only one of the two can be the weight."""
    model = hf.make(tmp_path, family)
    prefix = {"GPT2": "transformer.", "OPT": "model.", "GPTNeoX": "gpt_neox."}[family]
    name = next(name for name in model.state_dict() if name.startswith(prefix))
    rewrite(tmp_path, "torch", lambda state: state | {name.removeprefix(prefix): state[name]}, model)
    with pytest.raises(CheckpointError, match=r"unused: " + re.escape(name.removeprefix(prefix))):
        open_model(tmp_path, dtype="float32")
