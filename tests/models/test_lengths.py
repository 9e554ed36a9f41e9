"""Lengths with scaled rotary positions: what vLLM derives is accepted, and logits there are transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pjax import ConfigError
from pjax.engine.building import _resolve_length
from pjax.models import find_family, open_model
from tests.models import hf
from tests.models.test_families import logits_of

LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
THETA = {"rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("max_position", "scaling", "length"),
    [
        (128, {}, 128),
        (128, LINEAR, 512),
        (128, LINEAR | {"factor": 2.5}, 320),
        (128, LINEAR | {"original_max_position_embeddings": 32}, 512),
        (128, DYNAMIC, 512),
        (128, DYNAMIC | {"original_max_position_embeddings": 32}, 512),
        (128, YARN, 512),
        (128, YARN | {"original_max_position_embeddings": 128}, 512),
        (128, YARN | {"original_max_position_embeddings": 32}, 128),
        (32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),  # Qwen 2.5's recipe
        (131072, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (128, LLAMA3, 128),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPTNeoX"])
def test_a_models_length_is_what_vllm_derives(family: str, max_position: int, scaling: dict[str, Any], length: int) -> None:
    config = hf.make_config(family, max_position_embeddings=max_position).to_dict() | {"architectures": [f"{family}ForCausalLM"]}
    config |= {"rope_scaling": scaling or None, "rope_theta": 10000.0}
    del config["rope_parameters"]
    made = find_family(config).Config.from_hf(config)
    assert made.max_position == length
    assert _resolve_length(None, made.max_position) == length == _resolve_length(length, made.max_position)
    with pytest.raises(ConfigError, match=f"max_model_len is {length + 1}, but the model's own limit is {length}"):
        _resolve_length(length + 1, made.max_position)


@pytest.mark.parametrize(
    ("scaling", "compared"), [(LINEAR, (100, 512)), (YARN, (100, 512)), (DYNAMIC, (512,))], ids=["linear", "yarn", "dynamic"]
)
def test_logits_beyond_the_original_length(scaling: dict[str, Any], compared: tuple[int, ...], tmp_path: Path) -> None:
    """Four times 128 positions; dynamic scaling has transformers' base at its full length only."""
    model = hf.make(tmp_path, "Llama", rope_parameters=scaling | THETA)
    for length in compared:
        tokens = np.random.default_rng(3).integers(0, hf.VOCAB, (1, length)).tolist()
        np.testing.assert_allclose(logits_of(tmp_path, tokens), hf.torch_logits(model, tokens), atol=3e-4, rtol=2e-4)


def test_greedy_tokens_beyond_the_original_length(tmp_path: Path) -> None:
    """Prompts of 1, 7 and 50 tokens on 16 original positions, through pages."""
    model = hf.make(tmp_path, "Qwen2", rope_parameters=YARN | THETA | {"factor": 8.0}, max_position_embeddings=16)
    hf.check_greedy(model, hf.generate(hf.load(tmp_path), 40))


def test_rope_scaling_counts_before_rope_parameters(tmp_path: Path) -> None:
    """A recipe that somebody added to a config of transformers 5."""
    model = hf.make(tmp_path, "Qwen2", rope_parameters=YARN | {"rope_theta": 5000.0})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "rope_scaling": YARN}
    path.write_text(json.dumps(config))
    tokens = np.random.default_rng(3).integers(0, hf.VOCAB, (1, 200)).tolist()
    np.testing.assert_allclose(logits_of(tmp_path, tokens), hf.torch_logits(model, tokens), atol=3e-4, rtol=2e-4)


def test_attn_factor_multiplies_yarns_own(tmp_path: Path) -> None:
    """vLLM: yarn_get_mscale(factor) · attn_factor; transformers gets the product as its attention_factor."""
    own = 0.1 * np.log(4.0) + 1.0
    model = hf.make(tmp_path, "Llama", rope_parameters=YARN | THETA | {"attention_factor": own * 1.5})
    tokens = np.random.default_rng(3).integers(0, hf.VOCAB, (1, 200)).tolist()
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_parameters": YARN | THETA | {"attn_factor": 1.5}}))
    assert open_model(tmp_path, dtype="float32").config.rope.attn_factor == 1.5
    np.testing.assert_allclose(logits_of(tmp_path, tokens), hf.torch_logits(model, tokens), atol=3e-4, rtol=2e-4)
