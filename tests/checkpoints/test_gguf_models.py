"""GGUF files of every architecture against the torch model that they were made from, and transformers' own reading of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type

from pjax import CheckpointError, UnsupportedError
from pjax.convert import convert
from pjax.models import load, open_model, to_hf_state
from tests.checkpoints import gguf_files
from tests.models import hf
from tests.models.test_families import logits_of

WIDE: dict[str, Any] = {"intermediate_size": 64}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", WIDE),
    "llama, tied, biases": ("Llama", WIDE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama, heads of 24": ("Llama", WIDE | {"head_dim": 24, "num_key_value_heads": 1}),
    "llama 3.1": ("Llama", WIDE | {"head_dim": 64, "rope_parameters": LLAMA3 | {"factor": 8.0}}),
    "llama 3.2": ("Llama", WIDE | {"head_dim": 128, "rope_parameters": LLAMA3 | {"factor": 32.0}}),
    "qwen2": ("Qwen2", WIDE),
    "qwen2, tied": ("Qwen2", WIDE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", WIDE | {"head_dim": 16}),
    "qwen3, heads of 128": ("Qwen3", WIDE | {"head_dim": 128}),
    "qwen3, tied, biases": ("Qwen3", WIDE | {"tie_word_embeddings": True, "attention_bias": True}),
    "gpt2": ("GPT2", {"n_positions": 1024}),
    "gpt2, untied": ("GPT2", {"tie_word_embeddings": False, "n_positions": 1024}),
    "gpt2, untied, inner": ("GPT2", {"tie_word_embeddings": False, "n_inner": 96, "n_positions": 1024, "layer_norm_epsilon": 1e-2}),
    "gptneox": ("GPTNeoX", WIDE),
    "gptneox, in sequence": ("GPTNeoX", WIDE | {"use_parallel_residual": False}),
    "gptneox, no biases, all rotated": (
        "GPTNeoX",
        WIDE
        | {
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
    ),
}
TOKENS = np.random.default_rng(2).integers(0, hf.VOCAB, (2, 40)).tolist()


def make(tmp_path: Path, case: str, kind: Type = Type.F32, **fields: Any) -> tuple[Any, Path]:
    """The torch model and its GGUF file."""
    family, changes = CASES[case]
    model = hf.make(tmp_path / "hf", family, **changes)
    return model, gguf_files.write_model(tmp_path / "a.gguf", model, kind, **fields)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_model_it_was_made_from(case: str, tmp_path: Path) -> None:
    model, path = make(tmp_path, case)
    np.testing.assert_allclose(logits_of(path, TOKENS), hf.torch_logits(model, TOKENS), atol=2e-4, rtol=2e-4)
    check_parameters(path, model)


def check_parameters(path: Path, model: Any) -> None:
    """Every parameter by its Hugging Face name, bit for bit."""
    named = dict(model.named_parameters())
    ours = to_hf_state(load(path, progress=False))
    assert ours.keys() == named.keys()
    for name, parameter in named.items():
        np.testing.assert_array_equal(np.asarray(ours[name]), parameter.detach().numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        *((case, Type.Q8_0) for case in ("llama", "qwen2, tied", "qwen3", "gpt2", "gptneox")),
        *(("gptneox", kind) for kind in (Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1)),
    ],
)
def test_quantised_types(case: str, kind: Type, tmp_path: Path) -> None:
    """The torch model holds what quantisation left; a quantised tensor is dequantised, then put in order."""
    model, path = make(tmp_path, case, kind)
    assert sum(tensor.tensor_type == kind for tensor in gguf.GGUFReader(path).tensors) >= 9
    np.testing.assert_allclose(logits_of(path, TOKENS, dtype="float32"), hf.torch_logits(model, TOKENS), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(("family", "kind"), [("Qwen2", Type.Q4_K), ("GPT2", Type.Q6_K), ("GPTNeoX", Type.Q4_K), ("GPTNeoX", Type.Q6_K)])
def test_k_quants(family: str, kind: Type, tmp_path: Path) -> None:
    """Blocks of 256: a wider model."""
    sizes = {} if family == "GPT2" else {"intermediate_size": 256}
    model = hf.make(tmp_path / "hf", family, hidden_size=256, tie_word_embeddings=False, **sizes)
    path = gguf_files.write_model(tmp_path / "a.gguf", model, kind)
    assert sum(tensor.tensor_type == kind for tensor in gguf.GGUFReader(path).tensors) >= 9
    check_parameters(path, model)


@pytest.mark.parametrize("case", ["llama", "llama, heads of 24", "qwen2", "qwen2, tied", "qwen3, heads of 128", "gpt2", "gpt2, untied"])
def test_transformers_reads_the_same(case: str, tmp_path: Path) -> None:
    """It does not know gptneox, nor biases in a llama or qwen3, nor another width of gpt2's MLP or of qwen3's heads."""
    _, path = make(tmp_path, case)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    np.testing.assert_allclose(logits_of(path, TOKENS), hf.torch_logits(theirs, TOKENS), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("case", ["qwen2, tied", "qwen3", "gpt2", "gptneox"])
def test_converted_it_is_a_folder_for_transformers(case: str, tmp_path: Path) -> None:
    """config.json is made from the metadata alone."""
    model, path = make(tmp_path, case)
    made = convert(path, tmp_path / "made", progress=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
    np.testing.assert_allclose(hf.torch_logits(theirs, TOKENS), hf.torch_logits(model, TOKENS), atol=1e-5)


def test_an_older_gpt2_has_its_tied_head_twice(tmp_path: Path) -> None:
    """llama.cpp wrote output.weight for GPT-2 until 2024, often in another type than the embedding."""
    family, changes = CASES["gpt2"]
    model = hf.make(tmp_path / "hf", family, **changes | {"tie_word_embeddings": False})
    with torch.no_grad():
        model.lm_head.weight.copy_(model.transformer.wte.weight)
    path = gguf_files.write_model(tmp_path / "a.gguf", model)
    assert "output.weight" in {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    np.testing.assert_allclose(logits_of(path, TOKENS), hf.torch_logits(model, TOKENS), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("rotated", [2, 10, 34, 48])
def test_the_rotated_part_of_a_head_is_exact(rotated: int, tmp_path: Path) -> None:
    """It is stored as a number of elements, and a config has it as a share: 10/49 · 49 is less than 10 in floating point."""
    size = 98
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": (rotated + 0.5) / size}
    model = hf.make(tmp_path / "hf", "GPTNeoX", hidden_size=2 * size, num_attention_heads=2, rope_parameters=rope)
    path = gguf_files.write_model(tmp_path / "a.gguf", model)
    assert open_model(path, dtype="float32").config.rotary_size == rotated
    np.testing.assert_allclose(logits_of(path, TOKENS), hf.torch_logits(model, TOKENS), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("case", "fields", "error", "message"),
    [
        ("qwen2", {"qwen2.attention.sliding_window": 9}, UnsupportedError, r"does not apply: qwen2\.attention\.sliding_window=9"),
        ("gpt2", {"gpt2.rope.freq_base": 2.0}, UnsupportedError, r"does not apply: gpt2\.rope\.freq_base=2\.0"),
        ("gpt2", {"gpt2.attention.head_count_kv": 2}, UnsupportedError, r"head_count_kv is 2; supported: the number of heads 4"),
        ("gptneox", {"gptneox.attention.head_count_kv": 2}, UnsupportedError, r"head_count_kv is 2; supported: the number of heads 4"),
        ("qwen3", {"qwen3.expert_count": 8}, UnsupportedError, r"qwen3\.expert_count is 8; supported: dense models"),
        ("gptneox", {"gptneox.rope.scaling.type": "longrope"}, UnsupportedError, r"gptneox\.rope\.scaling\.type is 'longrope'"),
    ],
)
def test_what_is_not_applied_is_refused(case: str, fields: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    _, path = make(tmp_path, case, **fields)
    with pytest.raises(error, match=r"a\.gguf.*" + message):
        open_model(path, dtype="float32")


@pytest.mark.parametrize("case", ["llama 3.1", "llama 3.2"])
def test_llama3_scaling_is_found_in_its_effect(case: str, tmp_path: Path) -> None:
    model, path = make(tmp_path, case)
    rope, rope_of_folder = (open_model(where, dtype="float32").config.rope for where in (path, tmp_path / "hf"))
    assert rope == rope_of_folder
    assert rope.factor == CASES[case][1]["rope_parameters"]["factor"]
    model.config.rope_parameters["low_freq_factor"] = 2.0  # which no released model has
    other = gguf_files.write_model(tmp_path / "other.gguf", model)
    with pytest.raises(UnsupportedError, match=r"other\.gguf: tensor rope_freqs\.weight is not Llama 3's rotary scaling"):
        open_model(other, dtype="float32")


def test_biases_that_the_config_cannot_say_are_named(tmp_path: Path) -> None:
    """A llama has biases on all four of attention's products or on none."""
    model = hf.make(tmp_path / "hf", "Llama", attention_bias=True)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias = None
    path = gguf_files.write_model(tmp_path / "a.gguf", model)
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.0\.self_attn\.o_proj\.bias \[32\]"):
        open_model(path, dtype="float32")
