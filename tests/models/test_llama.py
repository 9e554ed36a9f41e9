"""LLaMA against transformers + torch on tiny random models: every config field that pjax applies."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pjax import LLM, SamplingParams

NUM_NEW = 12
NEAR_TIE = 1e-4
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "native attention kernel": {"head_dim": 64},
    "heads wider than the model": {"head_dim": 24},
    "one KV head": {"num_key_value_heads": 1},
    "attention bias": {"attention_bias": True},
    "MLP bias": {"mlp_bias": True},
    "gelu": {"hidden_act": "gelu"},
    "gelu, tanh form": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "theta and epsilon": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-2},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
    "dynamic, within its context": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32, "rope_theta": 10000.0,
        }
    },
    "yarn": {"rope_parameters": YARN | {"rope_theta": 10000.0}},
    "yarn, own attention factor": {"rope_parameters": YARN | {"attention_factor": 1.3, "rope_theta": 10000.0}},
    "yarn, betas": {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "rope_theta": 10000.0}},
    "yarn, mscale": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9, "rope_theta": 10000.0}},
}  # fmt: skip


def make(folder: Path, **changes: Any) -> Any:
    """A torch model with every parameter random, saved to the folder."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 120, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    config = transformers.LlamaConfig(**sizes | changes)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1 if "norm" in name else 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model


def load(folder: Path, **options: Any) -> LLM:
    sizes = {"max_model_len": 96, "max_num_seqs": 4, "max_num_batched_tokens": 16, "num_pages": 40, "page_size": 4}
    return LLM(folder, skip_tokenizer_init=True, lazy=True, progress=False, **sizes | options)


def prompts(vocab: int = 120) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocab, n).tolist() for n in (1, 7, 50)]


def run(llm: LLM) -> list[Any]:
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True, logprobs=0)
    return [output.outputs[0] for output in llm.generate(prompts(), params, use_tqdm=False)]


def check_against(model: Any, outputs: list[Any]) -> None:
    """Each token is the likeliest (or nearly) after those before it, and its log-probability is transformers' own."""
    import torch

    for prompt, output in zip(prompts(), outputs, strict=True):
        tokens = output.token_ids
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :].double().numpy()
        chosen = logits[np.arange(NUM_NEW), tokens]
        assert (logits.max(axis=-1) - chosen).max() <= NEAR_TIE
        top = logits.max(axis=-1)
        expected = chosen - top - np.log(np.exp(logits - top[:, None]).sum(axis=-1))
        got = [entry[token].logprob for entry, token in zip(output.logprobs, tokens, strict=True)]
        np.testing.assert_allclose(got, expected, atol=1e-3)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_config_fields(name: str, tmp_path: Path) -> None:
    model = make(tmp_path, **CONFIGS[name])
    check_against(model, run(load(tmp_path)))


def test_every_way_to_run_the_layers_gives_the_same(tmp_path: Path) -> None:
    model = make(tmp_path, attention_bias=True)
    by_mode = {mode: run(load(tmp_path, layer_mode=mode)) for mode in ("unroll", "scan", "loop")}
    for outputs in by_mode.values():
        check_against(model, outputs)
        for one, other in zip(outputs, by_mode["unroll"], strict=True):
            assert one.token_ids == other.token_ids
            assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-4)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_every_page_size(page_size: int, tmp_path: Path) -> None:
    check_against(make(tmp_path), run(load(tmp_path, page_size=page_size, num_pages=160 // page_size + 2)))


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    """Log-probabilities of the same tokens, teacher-forced by the prompt."""
    make(tmp_path)
    tokens = [output.token_ids for output in run(load(tmp_path))]
    exact, half = ([], [])
    for into, dtype in ((exact, "float32"), (half, "bfloat16")):
        llm = load(tmp_path, dtype=dtype)
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=20, ignore_eos=True)
        for prompt, new in zip(prompts(), tokens, strict=True):
            entry = llm.generate([prompt + new], params, use_tqdm=False)[0].outputs[0].logprobs[0]
            into.append(entry)
    for one, other in zip(exact, half, strict=True):
        both = sorted(one.keys() & other.keys())
        assert len(both) > 10
        assert max(abs(one[token].logprob - other[token].logprob) for token in both) < 0.3
