"""Small random models made by transformers, and what pjax makes of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from pjax import LLM, SamplingParams
from tests.budget import IS_THOROUGH

VOCAB = 120
NEAR_TIE = 1e-4
SIZES: dict[str, dict[str, Any]] = {
    "Llama": {"intermediate_size": 40, "num_key_value_heads": 2},
    "Mistral": {"intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 8},
    "Qwen2": {"intermediate_size": 40, "num_key_value_heads": 2},
    "Qwen3": {"intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 8},
    "GPTNeoX": {"intermediate_size": 40},
    "OPT": {"ffn_dim": 40, "word_embed_proj_dim": 32},
    "GPT2": {},
}
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def make_config(family: str, **changes: Any) -> Any:
    """A small config; `changes` are the family's own fields."""
    sizes = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, **COMMON, **SIZES[family], **changes}
    if family == "GPT2":
        sizes = {GPT2_NAMES.get(name, name): value for name, value in sizes.items()}
    return getattr(transformers, f"{family}Config")(**sizes)


def make(folder: Path, family: str, **changes: Any) -> Any:
    """A torch model with every parameter random, large enough that outputs vary, saved to the folder."""
    config = make_config(family, **changes)
    torch.manual_seed(0)
    model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = any(word in name for word in ("norm", "ln_")) and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.shape[-1] <= 64 else 0.1) + (1 if is_norm else 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model


def torch_logits(model: Any, tokens: list[list[int]]) -> np.ndarray:
    """float64 [B, S, V]."""
    with torch.inference_mode():
        return model(torch.tensor(tokens)).logits.double().numpy()


def load(folder: Path, **options: Any) -> LLM:
    """An engine whose steps are so small that prompts come in chunks beside decoding, with pages for one long sequence and a bit."""
    sizes = {"max_model_len": 128, "max_num_seqs": 2, "max_num_batched_tokens": 16, "num_pages": 30, "page_size": 4}
    if IS_THOROUGH:
        sizes |= {"max_num_seqs": 4, "num_pages": 40}
    return LLM(folder, skip_tokenizer_init=True, lazy=True, progress=False, **sizes | options)


def prompts() -> list[list[int]]:
    """Prompts of 1, 7 and 50 tokens."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, n).tolist() for n in (1, 7, 50)]


def generate(llm: LLM, num_new: int) -> list[Any]:
    """Greedy, with the log-probability of each token."""
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, logprobs=0)
    return [output.outputs[0] for output in llm.generate(prompts(), params, use_tqdm=False)]


def check_greedy(model: Any, outputs: list[Any], *, tolerance: float = 1e-3) -> None:
    """Each token is the likeliest (or within NEAR_TIE of it) after those before it, and its log-probability is torch's own."""
    for prompt, output in zip(prompts(), outputs, strict=True):
        tokens = list(output.token_ids)
        logits = torch_logits(model, [prompt + tokens[:-1]])[0, len(prompt) - 1 :]
        chosen = logits[np.arange(len(tokens)), tokens]
        top = logits.max(axis=-1)
        assert (top - chosen).max() <= NEAR_TIE
        expected = chosen - top - np.log(np.exp(logits - top[:, None]).sum(axis=-1))
        got = [entry[token].logprob for entry, token in zip(output.logprobs, tokens, strict=True)]
        np.testing.assert_allclose(got, expected, atol=tolerance)
