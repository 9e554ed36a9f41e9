"""Every family against transformers + torch on small random models: every config field that pjax applies, both ways.

A config field changes what a model computes, and that is seen in the logits of its dense path, for each configuration. The engine
runs the same layers on pages: it is tried once for each mechanism (`THROUGH_PAGES`), and for every configuration by `make test-all`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from pjax import models
from pjax.errors import CheckpointError, UnsupportedError
from pjax.models import gpt_neox
from tests.models import hf

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "Llama": {
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "heads of 64, ratio 3": {"head_dim": 64, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1},
        "heads of 128, ratio 8": {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 1},
        "heads of 24, ratio 1": {"head_dim": 24, "num_key_value_heads": 4},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "gelu": {"hidden_act": "gelu"},
        "gelu, tanh form": {"hidden_act": "gelu_pytorch_tanh"},
        "relu, theta": {"hidden_act": "relu", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        "epsilon": {"rms_norm_eps": 1e-2},
        "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
        "llama3": {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32, "rope_theta": 10000.0,
            }
        },
        "yarn": {"rope_parameters": YARN},
        "yarn, own attention factor": {"rope_parameters": YARN | {"attention_factor": 1.3}},
        "yarn, betas": {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}},
        "yarn, mscale": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}},
    },
    "Mistral": {
        "window": {"sliding_window": 9},
        "no window": {"sliding_window": None},
    },
    "Qwen2": {
        "plain": {},
        "tied, ratio 1": {"tie_word_embeddings": True, "num_key_value_heads": 4},
        "window": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
        "window of the second layer": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    },
    "Qwen3": {
        "plain": {},
        "biases, heads of 80": {"attention_bias": True, "head_dim": 80},
        "tied, window": {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    },
    "GPTNeoX": {
        "plain": {},
        "in sequence": {"use_parallel_residual": False},
        "no attention bias, tied": {"attention_bias": False, "tie_word_embeddings": True},
        "all of a head rotated": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
        "half of a head, other base": {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.5}},
        "linear scaling": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        "heads of 80, gelu_fast": {"hidden_size": 160, "num_attention_heads": 2, "hidden_act": "gelu_fast"},
        "heads of 96, relu, epsilon": {"hidden_size": 192, "num_attention_heads": 2, "hidden_act": "relu", "layer_norm_eps": 1e-2},
    },
    "OPT": {
        "plain": {},
        "as the 350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
        "norm after": {"do_layer_norm_before": False},
        "projected": {"word_embed_proj_dim": 16},
        "no biases": {"enable_bias": False},
        "norms without weights": {"layer_norm_elementwise_affine": False},
        "no final norm": {"_remove_final_layer_norm": True},
        "gelu, untied, heads of 64": {
            "activation_function": "gelu", "tie_word_embeddings": False, "word_embed_proj_dim": 128, "hidden_size": 128,
            "num_attention_heads": 2,
        },
    },
    "GPT2": {
        "plain": {},
        "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
        "not scaled": {"scale_attn_weights": False},
        "upcast": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
        "gelu, n_inner": {"activation_function": "gelu", "n_inner": 40},
        "gelu_pytorch_tanh, untied": {"activation_function": "gelu_pytorch_tanh", "tie_word_embeddings": False},
        "silu, heads of 64, epsilon": {"activation_function": "silu", "n_embd": 128, "n_head": 2, "layer_norm_epsilon": 1e-2},
    },
}  # fmt: skip
THROUGH_PAGES = {  # of what depends on positions, pages or the layer, one of each kind
    "Llama": ("plain", "yarn"),
    "Mistral": ("window",),
    "Qwen2": ("window of the second layer",),
    "GPTNeoX": ("plain",),
    "OPT": ("as the 350m",),
    "GPT2": ("scaled by layer",),
}
ALL = [pytest.param(family, name, id=f"{family}: {name}") for family, configs in CONFIGS.items() for name in configs]
ENGINES = [
    pytest.param(family, name, marks=[] if name in THROUGH_PAGES.get(family, ()) else pytest.mark.extended, id=f"{family}: {name}")
    for family, configs in CONFIGS.items()
    for name in configs
]


def logits_of(folder: Path, tokens: list[list[int]], **options: Any) -> np.ndarray:
    """float32 [B, S, V] by the dense path."""
    model = models.load(folder, progress=False, **options)
    return np.asarray(jax.jit(lambda ids: models.forward(model, ids))(jnp.asarray(tokens)))


@pytest.mark.parametrize(("family", "name"), ALL)
def test_logits(family: str, name: str, tmp_path: Path, kept_programs: None) -> None:
    """Within 2e-4 at every position."""
    model = hf.make(tmp_path, family, **CONFIGS[family][name])
    tokens = np.random.default_rng(2).integers(0, hf.VOCAB, (2, 100)).tolist()
    want = hf.torch_logits(model, tokens)
    assert want.std(axis=1).max() > 0.1  # outputs vary
    np.testing.assert_allclose(logits_of(tmp_path, tokens), want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(("family", "name"), ENGINES)
def test_greedy_tokens_through_pages(family: str, name: str, tmp_path: Path) -> None:
    """64 tokens of a mixed batch, prompts in chunks."""
    model = hf.make(tmp_path, family, **CONFIGS[family][name])
    layers = CONFIGS[family][name].get("max_window_layers", 0)
    more = {"num_pages": 40} if layers else {}  # layers of two kinds: each page has half of them
    hf.check_greedy(model, hf.generate(hf.load(tmp_path, **more), 64))


FAMILIES = ["Llama", "GPTNeoX", "OPT", "GPT2"]
TELLING = {
    "GPT2": {"scale_attn_by_inverse_layer_idx": True},
    "OPT": {"word_embed_proj_dim": 16},
    "GPTNeoX": {},
    "Llama": {"attention_bias": True},
}


@pytest.mark.parametrize("mode", ["scan", "unroll"])  # a CPU's engine loops, as above
@pytest.mark.parametrize("family", ["Llama", *(pytest.param(family, marks=pytest.mark.extended) for family in FAMILIES[1:])])
def test_every_way_to_run_the_layers_gives_the_same(family: str, mode: str, tmp_path: Path) -> None:
    model = hf.make(tmp_path, family, **TELLING[family])
    hf.check_greedy(model, hf.generate(hf.load(tmp_path, layer_mode=mode), 12))


@pytest.mark.parametrize("page_size", [1, *(pytest.param(size, marks=pytest.mark.extended) for size in (16, 64))])
def test_every_page_size(page_size: int, tmp_path: Path) -> None:
    model = hf.make(tmp_path, "Llama")
    hf.check_greedy(model, hf.generate(hf.load(tmp_path, page_size=page_size, num_pages=160 // page_size + 2), 12))


@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16_is_near_float32(family: str, tmp_path: Path, kept_programs: None) -> None:
    """As near as torch's own bfloat16 is, within a factor."""
    model = hf.make(tmp_path, family)
    tokens = np.random.default_rng(2).integers(0, hf.VOCAB, (2, 40)).tolist()
    exact = hf.torch_logits(model, tokens)
    got = logits_of(tmp_path, tokens, dtype="bfloat16")
    theirs = hf.torch_logits(model.bfloat16(), tokens)
    assert np.abs(got - exact).mean() < 2 * np.abs(theirs - exact).mean()


@pytest.mark.parametrize("mode", ["unroll", "scan"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_and_names_are_torchs(family: str, mode: str, tmp_path: Path, kept_programs: None) -> None:
    """jax.grad of the mean log-likelihood through the dense path, by Hugging Face's names; the parameters too."""
    theirs = hf.make(tmp_path, family, **TELLING[family])
    tokens = np.random.default_rng(3).integers(0, hf.VOCAB, (2, 20))
    targets = torch.tensor(tokens[:, 1:].reshape(-1))
    logits = theirs(torch.tensor(tokens)).logits[:, :-1].reshape(-1, hf.VOCAB)
    torch.nn.functional.cross_entropy(logits, targets).backward()
    ours = models.load(tmp_path, layer_mode=mode, progress=False)
    graph, state = nnx.split(ours)

    def loss(state: Any) -> jax.Array:
        logprobs = jax.nn.log_softmax(models.forward(nnx.merge(graph, state), jnp.asarray(tokens, jnp.int32)))[:, :-1]
        return -jnp.take_along_axis(logprobs, jnp.asarray(tokens[:, 1:, None]), axis=-1).mean()

    gradients = models.to_hf_state(nnx.merge(graph, jax.jit(jax.grad(loss))(state)))
    parameters = models.to_hf_state(ours)
    named = dict(theirs.named_parameters())
    assert gradients.keys() == named.keys() == parameters.keys()
    for name, parameter in named.items():
        np.testing.assert_array_equal(np.asarray(parameters[name]), parameter.detach().numpy(), err_msg=name)
        scale = float(parameter.grad.abs().max())
        np.testing.assert_allclose(np.asarray(gradients[name]), parameter.grad.numpy(), atol=2e-4 * scale + 1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("GPT2", {"add_cross_attention": True}, "gpt2 config: add_cross_attention is True; supported: False"),
        ("GPTNeoX", {"hidden_act": "tanh"}, "gpt_neox config: hidden_act is 'tanh'; supported: 'silu'"),
        ("OPT", {"new_norm": 3}, "opt config has fields that pjax does not apply: new_norm=3"),
    ],
)
def test_what_is_not_applied_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    config = hf.make_config(family, **changes).to_dict() | {"architectures": [_architecture(family)]}
    with pytest.raises(UnsupportedError, match=message):
        models.find_family(config).Config.from_hf(config)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("GPT2", {"n_head": 5}, "gpt2 config: n_head is 5, but must divide n_embd 32"),
        ("OPT", {"num_attention_heads": 5}, "opt config: num_attention_heads is 5, but must divide hidden_size 32"),
        ("GPTNeoX", {"rotary_pct": 0.1}, "rotary_pct is 0.1, which rotates 0 of the 8"),
        ("GPTNeoX", {"rotary_pct": 1.5}, r"rotary_pct is 1.5, but must be in \(0, 1\]"),
        ("Qwen2", {"layer_types": ["full_attention"] * 3}, "qwen2 config: layer_types is .*, but must be 2 of full_attention, sliding_att"),
        ("Qwen3", {"layer_types": ["full_attention", "chunked"]}, "qwen3 config: layer_types is .*'chunked'.*, but must be 2 of"),
        ("Qwen3", {"num_key_value_heads": 3}, "qwen3 config: num_key_value_heads is 3, but must divide num_attention_heads 4"),
    ],
)
def test_bad_configs_are_named(family: str, changes: dict[str, Any], message: str) -> None:
    config = hf.make_config(family).to_dict() | {"architectures": [_architecture(family)]} | changes
    config.pop("rope_parameters", None)
    with pytest.raises(CheckpointError, match=message):
        models.find_family(config).Config.from_hf(config)


def _architecture(family: str) -> str:
    return "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"


def test_transformers_4_spells_neox_otherwise(tmp_path: Path) -> None:
    config = hf.make_config("GPTNeoX").to_dict() | {"rotary_pct": 0.5, "rotary_emb_base": 700}
    del config["rope_parameters"]
    made = models.find_family({"architectures": ["GPTNeoXForCausalLM"]}).Config.from_hf(config)
    assert (made.rope.fraction, made.rope.theta, made.rotary_size) == (0.5, 700.0, 4)
    assert dataclasses.is_dataclass(made)
    both = config | {"partial_rotary_factor": 0.5, "rope_theta": 700.0}  # as its last versions wrote it
    assert gpt_neox.Config.from_hf(both) == made
    with pytest.raises(CheckpointError, match="gpt_neox config: rotary_emb_base 700 and rope_theta 800 differ, but mean the same"):
        gpt_neox.Config.from_hf(both | {"rope_theta": 800})
