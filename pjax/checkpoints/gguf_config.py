"""A Hugging Face config from the metadata of a GGUF file. Keys and defaults are those of llama.cpp's convert_hf_to_gguf.py."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pjax.checkpoints.inert_keys import sort_unknown
from pjax.errors import CheckpointError, UnsupportedError

log = logging.getLogger(__name__)

# Fields that are applied here, or that change no forward pass.
COMMON = frozenset(
    "attention.head_count attention.head_count_kv block_count context_length embedding_length expert_count expert_used_count "
    "attention.causal feed_forward_length vocab_size".split()
)
ROTARY = frozenset(
    "rope.dimension_count rope.freq_base rope.scale_linear rope.scaling.factor rope.scaling.finetuned "
    "rope.scaling.attn_factor rope.scaling.original_context_length rope.scaling.type rope.scaling.yarn_attn_factor "
    "rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow rope.scaling.yarn_ext_factor".split()
)
LLAMA = (
    COMMON | ROTARY | frozenset("attention.key_length attention.layer_norm_rms_epsilon attention.value_length tensor_data_layout".split())
)
GPT2 = COMMON | {"attention.layer_norm_epsilon"}
GPT_NEOX = COMMON | ROTARY | {"attention.layer_norm_epsilon", "use_parallel_residual"}
ROPE_FACTORS = "rope_freqs.weight"  # what llama.cpp makes of rope type llama3: a divisor of each rotary frequency
# Values with which a field changes nothing; with another one it is refused.
NEUTRAL_VALUES: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,  # llama.cpp: the usual one
    "embedding_scale": 1.0,
    "leading_dense_block_count": 0,
    "logit_scale": 1.0,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
    "residual_scale": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
LONG_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
# Llama 3.1 and 3.2 alike (their factor is another one); the file does not have these.
LLAMA3: dict[str, Any] = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Fields:
    """Metadata with checks; keys without the architecture in front."""

    architecture: str
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]  # of the tensors, slowest axis first
    rope_factors: np.ndarray | None
    path: Path

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        """A number; CheckpointError when it is missing or none, UnsupportedError when every layer has its own."""
        value, name = self.get(key, default), f"{self.architecture}.{key}"
        if value is None:
            raise CheckpointError(f"{self.path} has no metadata field {name}")
        if isinstance(value, list):
            raise UnsupportedError(f"{self.path}: {name} is {value}, one a layer; supported: one number for all layers")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.path}: {name} is {value!r}, but must be a number")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer >= 1; errors as in `number`."""
        value = self.number(key, default)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.path}: {self.architecture}.{key} is {value!r}, but must be an integer >= 1")
        return value

    def only(self, key: str, supported: int, what: str) -> None:
        """Refuses an integer that is there and is another one."""
        if (value := self.integer(key, supported)) != supported:
            raise UnsupportedError(f"{self.path}: {self.architecture}.{key} is {value}; supported: {what} {supported}")

    def has_bias(self, start: str) -> bool:
        """Whether a layer has a bias whose name begins so: `attn_q`, `ffn`."""
        names = (name.split(".") for name in self.shapes)
        return any(words[0] == "blk" and words[-1] == "bias" and words[-2].startswith(start) for words in names if len(words) > 2)

    @property
    def shared(self) -> dict[str, Any]:
        """What every architecture's config has under the same name."""
        if len(self.shapes.get("token_embd.weight", ())) != 2:
            raise CheckpointError(f"{self.path} has no two-dimensional tensor token_embd.weight")
        return {
            "vocab_size": self.shapes["token_embd.weight"][0],
            "tie_word_embeddings": "output.weight" not in self.shapes,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
            "torch_dtype": "float32",
        }


def check_architecture(metadata: Mapping[str, Any], path: Path) -> str:
    """A file's architecture. CheckpointError when it names none, UnsupportedError when pjax does not have it."""
    architecture = metadata.get("general.architecture")
    if architecture is None:
        raise CheckpointError(f"{path} has no metadata field general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(f"{path}: GGUF architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    return str(architecture)


def hf_config(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_factors: np.ndarray | None, path: Path
) -> dict[str, Any]:
    """config.json as transformers would write it for the model of a GGUF file.

    Args:
      metadata: the file's fields, names with their prefixes.
      shapes: of its tensors, slowest axis first.
      rope_factors: the tensor ROPE_FACTORS, where it has one.
      path: for messages.
    Raises CheckpointError when a field is missing or wrong, UnsupportedError when one changes what pjax does not apply.
    """
    architecture = check_architecture(metadata, path)
    applied, make = ARCHITECTURES[architecture]
    for name in LONG_FACTORS:
        if name in shapes:
            raise UnsupportedError(f"{path}: tensor {name} (longrope rotary scaling) is not supported")
    if rope_factors is not None and make is not _llama:
        raise UnsupportedError(f"{path}: tensor {ROPE_FACTORS} is not supported for architecture {architecture}")
    fields = Fields(architecture, metadata, shapes, rope_factors, path)
    if fields.get("expert_count"):
        raise UnsupportedError(f"{path}: {architecture}.expert_count is {fields.get('expert_count')}; supported: dense models")
    _check_unknown(fields, applied)
    return make(fields)


def _check_unknown(fields: Fields, applied: frozenset[str]) -> None:
    """Refuses fields that are not applied and could change the result, and names the other unknown ones in the log."""
    prefix = f"{fields.architecture}."
    values = {key.removeprefix(prefix): value for key, value in fields.metadata.items() if key.startswith(prefix)}
    changed = [key for key, neutral in NEUTRAL_VALUES.items() if values.get(key, neutral) != neutral]
    refused, ignored = sort_unknown(key for key in values if key not in applied and key not in NEUTRAL_VALUES)
    refused = sorted({*changed, *refused})

    def shown(keys: list[str]) -> str:
        return ", ".join(f"{prefix}{key}={values[key]!r}" for key in keys)

    if refused:
        raise UnsupportedError(f"{fields.path} has metadata fields that pjax does not apply: {shown(refused)}")
    if ignored:
        log.info("%s has metadata fields that are ignored: %s", fields.path.name, shown(ignored))


def _llama(fields: Fields) -> dict[str, Any]:
    """llama, qwen2 and qwen3: they differ in where a bias or a norm may be."""
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_size = fields.integer("attention.key_length", hidden // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        fields.only(key, head_size, "the head size")
    config = {
        "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[fields.architecture] + "ForCausalLM"],
        "model_type": fields.architecture,
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_size,
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(fields) if fields.rope_factors is None else _llama3_scaling(fields, head_size),
        "hidden_act": "silu",
        **fields.shared,
    }
    if fields.architecture != "qwen2":  # which has biases of q, k and v, and no others
        config["attention_bias"] = fields.has_bias("attn")
    if fields.architecture == "llama":
        config["mlp_bias"] = fields.has_bias("ffn")
    return config


def _gpt2(fields: Fields) -> dict[str, Any]:
    heads = fields.integer("attention.head_count")
    fields.only("attention.head_count_kv", heads, "the number of heads")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": fields.integer("embedding_length"),
        "n_inner": fields.integer("feed_forward_length"),
        "n_layer": fields.integer("block_count"),
        "n_head": heads,
        "n_positions": fields.integer("context_length"),
        "layer_norm_epsilon": fields.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        **fields.shared,
    }


def _gpt_neox(fields: Fields) -> dict[str, Any]:
    """The file does not say which GELU: the exact one, which Pythia and Dolly v2 have."""
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    fields.only("attention.head_count_kv", heads, "the number of heads")
    head_size = hidden // heads
    rotated = fields.integer("rope.dimension_count", head_size)
    parallel = fields.get("use_parallel_residual", True)
    if not isinstance(parallel, bool):
        raise CheckpointError(f"{fields.path}: gptneox.use_parallel_residual is {parallel!r}, but must be true or false")
    share = rotated / head_size
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": heads,
        "max_position_embeddings": fields.integer("context_length"),
        "layer_norm_eps": fields.number("attention.layer_norm_epsilon"),
        "rotary_pct": share if int(head_size * share) == rotated else math.nextafter(share, 2.0),  # the product is rounded down
        "rotary_emb_base": fields.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(fields),
        "use_parallel_residual": parallel,
        "attention_bias": fields.has_bias("attn_qkv"),
        "hidden_act": "gelu",
        **fields.shared,
    }


def _rope_scaling(fields: Fields) -> dict[str, Any] | None:
    """As llama.cpp reads it: a factor without a type scales linearly, and no factor or 0 means no scaling."""
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 0.0))
    kind = fields.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        name = f"{fields.architecture}.rope.scaling.type"
        raise UnsupportedError(f"{fields.path}: {name} is {kind!r}; supported: none, linear, yarn")
    attn_factor = fields.number("rope.scaling.attn_factor", fields.number("rope.scaling.yarn_attn_factor", 1.0))
    if attn_factor != 1 and (kind != "yarn" or factor in (0, 1)):
        raise UnsupportedError(f"{fields.path}: {fields.architecture}.rope.scaling.attn_factor is {attn_factor}; supported: 1, or yarn")
    if kind == "none" or factor in (0, 1):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if (original := fields.get("rope.scaling.original_context_length")) is not None:
        scaling["original_max_position_embeddings"] = original
    if attn_factor != 1:
        scaling["attn_factor"] = attn_factor
    if kind == "yarn":
        for key in ("beta_fast", "beta_slow"):
            if (value := fields.get(f"rope.scaling.yarn_{key}")) is not None:
                scaling[key] = value
    return scaling


def _llama3_scaling(fields: Fields, head_size: int) -> dict[str, Any]:
    """Llama 3's rotary scaling, found in its effect: the largest divisor is the factor, and the others have to follow from it."""
    found = np.asarray(fields.rope_factors, np.float64)
    scaling = LLAMA3 | {"factor": round(float(found.max(initial=1.0)), 3)}
    theta, original = fields.number("rope.freq_base", 10000.0), LLAMA3["original_max_position_embeddings"]
    turns = original * theta ** (-np.arange(0, head_size, 2) / head_size) / (2 * np.pi)  # in the original context
    smooth = np.clip((turns - LLAMA3["low_freq_factor"]) / (LLAMA3["high_freq_factor"] - LLAMA3["low_freq_factor"]), 0, 1)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        raise UnsupportedError(
            f"{fields.path}: tensor {ROPE_FACTORS} is not Llama 3's rotary scaling; supported: that one; use safetensors"
        )
    if _rope_scaling(fields) is not None:
        raise UnsupportedError(f"{fields.path} has rotary scaling in its metadata and in tensor {ROPE_FACTORS}; supported: one of the two")
    return scaling


ARCHITECTURES: dict[str, tuple[frozenset[str], Callable[[Fields], dict[str, Any]]]] = {
    "llama": (LLAMA, _llama),
    "qwen2": (LLAMA, _llama),
    "qwen3": (LLAMA, _llama),
    "gpt2": (GPT2, _gpt2),
    "gptneox": (GPT_NEOX, _gpt_neox),
}
"""GGUF's architectures: the fields that are applied, and what makes the config."""
