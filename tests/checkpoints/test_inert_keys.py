"""Fields of configs: what changes nothing loads and gives transformers' logits, what could change something is refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from pjax import UnsupportedError
from pjax.checkpoints.inert_keys import is_inert
from pjax.models import find_family, open_model
from tests.checkpoints.test_gguf_models import TOKENS, make
from tests.models import hf
from tests.models.test_families import logits_of

INERT: dict[str, Any] = {
    "unsloth_version": "2025.3", "unsloth_fixed": True, "_num_labels": 5, "num_labels": 5, "tokenizer_class": "LlamaTokenizer",
    "model_max_length": 4096, "attn_implementation": "flash_attention_2", "_attn_implementation_autoset": True,
    "_experts_implementation": "eager", "neftune_noise_alpha": 5.0, "pad_token": "<pad>", "mask_token_id": 7, "pad_token_id": 99999,
    "max_length": 20, "min_length": 0, "do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 0.9, "output_scores": False,
    "num_beams": 1, "suppress_tokens": None, "return_dict_in_generate": False, "transformers_version": "4.50.0",
    "gradient_checkpointing": False, "ffn_dropout": 0.1, "router_aux_loss_coef": 0.01, "use_cache": True,
}  # fmt: skip


def llama(**changes: Any) -> dict[str, Any]:
    return hf.make_config("Llama").to_dict() | {"architectures": ["LlamaForCausalLM"]} | changes


def from_hf(config: dict[str, Any]) -> Any:
    return find_family(config).Config.from_hf(config)


@pytest.mark.parametrize("key", INERT)
def test_inert_fields_are_dropped_in_silence(key: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pjax"):
        assert from_hf(llama(**{key: INERT[key]})) == from_hf(llama())
    assert caplog.records == []


def test_all_of_them_leave_the_logits_as_they_are(tmp_path: Path) -> None:
    model = hf.make(tmp_path, "Llama")
    want = hf.torch_logits(model, TOKENS)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | INERT))
    np.testing.assert_allclose(logits_of(tmp_path, TOKENS), want, atol=2e-4, rtol=2e-4)


def test_every_generation_field_of_transformers_is_inert() -> None:
    """Those that transformers 4 could write into config.json; the rest are newer."""
    newer = {
        "max_matching_ngram_size",
        "compile_config",
        "continuous_batching_config",
        "disable_compile",
        "max_cache_len",
        "top_h",
        "use_mtp",
    }
    keys = [
        key
        for key in transformers.GenerationConfig().to_dict()
        if not key.startswith(("_", "assistant_", "is_assistant", "target_", "speculation_"))
    ]
    assert [key for key in keys if not is_inert(key) and key not in newer] == []


def test_unknown_fields_are_named_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pjax"):
        assert from_hf(llama(made_by="me", company={"name": "x"}, epochs=3)) == from_hf(llama())
    assert [r.getMessage() for r in caplog.records] == [
        "llama config has fields that are ignored: company={'name': 'x'}, epochs=3, made_by='me'"
    ]


@pytest.mark.parametrize(
    "key",
    "attn_logit_softcapping final_logit_softcapping attention_multiplier residual_multiplier logits_scaling embedding_multiplier "
    "qk_norm use_qk_norm num_experts num_local_experts n_routed_experts moe_intermediate_size kv_lora_rank clip_qkv no_rope_layers "
    "rope_local_base_freq query_pre_attn_scalar attention_chunk_size attn_temperature_tuning norm_type layer_norm_type "
    "parallel_attn alibi new_decoder_architecture multi_query use_mup quantization_config compression_config sliding_window_pattern "
    "cross_attention_layers tie_lm_head mlp_type alpha_residual mamba_d_state conv_kernel num_nextn_predict_layers use_mrope_x "
    "causal hiddenSizes logit_scale ssm_cfg ffn_config attn_config head_type block_types n_shared_heads".split(),
)  # fmt: skip
def test_fields_of_known_architectures_are_refused(key: str) -> None:
    """Fields by which other models differ from a llama."""
    with pytest.raises(UnsupportedError, match=f"llama config has fields that pjax does not apply: {key}=3"):
        from_hf(llama(**{key: 3}))


@pytest.mark.parametrize(
    ("scaling", "ignored"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "finetuned": True}, None),
        ({"rope_type": "yarn", "factor": 4.0, "attn_factor": 1, "extrapolation_factor": 1.0}, None),
        ({"rope_type": "linear", "factor": 4.0, "attn_factor": 1.0}, None),
        ({"rope_type": "default", "factor": 4.0}, "factor=4.0"),
        ({"rope_type": "yarn", "factor": 4.0, "low_freq_factor": 1.0}, "low_freq_factor=1.0"),
    ],
)
def test_inert_fields_of_rope_scaling(scaling: dict[str, Any], ignored: str | None, caplog: pytest.LogCaptureFixture) -> None:
    plain = {"rope_type": scaling["rope_type"]} | ({} if scaling["rope_type"] == "default" else {"factor": 4.0})
    with caplog.at_level(logging.INFO, "pjax"):
        assert from_hf(llama(rope_parameters=scaling)) == from_hf(llama(rope_parameters=plain))
    assert [r.getMessage() for r in caplog.records] == (
        [] if ignored is None else [f"rope scaling config has fields that are ignored: {ignored}"]
    )


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "linear", "factor": 4.0, "attn_factor": 1.5}, "attn_factor is 1.5; supported: 1"),
        ({"rope_type": "yarn", "factor": 4.0, "extrapolation_factor": 0.5}, "extrapolation_factor is 0.5; supported: 1"),
        ({"rope_type": "yarn", "factor": 4.0, "alpha": 1}, "rope scaling config has fields that pjax does not apply: alpha=1"),
        ({"rope_type": "yarn", "factor": 4.0, "whatever": 1}, "rope scaling config has fields that pjax does not apply: whatever=1"),
    ],
)
def test_fields_of_rope_scaling_that_are_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        from_hf(llama(rope_parameters=scaling))


def test_inert_metadata_of_gguf(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields = {"attention.causal": True, "rope.scaling.attn_factor": 1.0, "logit_scale": 1.0, "made_by": "me"}
    model, path = make(tmp_path, "llama", **{f"llama.{key}": value for key, value in fields.items()})
    with caplog.at_level(logging.INFO, "pjax"):
        np.testing.assert_allclose(logits_of(path, TOKENS), hf.torch_logits(model, TOKENS), atol=2e-4, rtol=2e-4)
    assert [r.getMessage() for r in caplog.records if "fields" in r.getMessage()] == [
        "a.gguf has metadata fields that are ignored: llama.made_by='me'"
    ]


def test_attn_factor_of_gguf(tmp_path: Path) -> None:
    fields = {"type": "yarn", "factor": 4.0, "original_context_length": 32, "attn_factor": 1.5}
    _, path = make(tmp_path, "llama", **{f"llama.rope.scaling.{key}": value for key, value in fields.items()})
    config = open_model(path, dtype="float32").config
    assert (config.rope.kind, config.rope.factor, config.rope.attn_factor, config.max_position) == ("yarn", 4.0, 1.5, 128)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention.causal": False}, r"does not apply: llama\.attention\.causal=False"),
        ({"rope.scaling.attn_factor": 1.5}, r"llama\.rope\.scaling\.attn_factor is 1\.5; supported: 1, or yarn"),
        ({"attention.new": 3}, r"does not apply: llama\.attention\.new=3"),
    ],
)
def test_metadata_of_gguf_that_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, path = make(tmp_path, "llama", **{f"llama.{key}": value for key, value in fields.items()})
    with pytest.raises(UnsupportedError, match=r"a\.gguf.*" + message):
        open_model(path, dtype="float32")
