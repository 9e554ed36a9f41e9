"""GGUF files as llama.cpp's convert_hf_to_gguf.py makes them, with the names and keys of the `gguf` package, from torch models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from tokenizers import pre_tokenizers

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gpt2": MODEL_ARCH.GPT2,
    "gpt_neox": MODEL_ARCH.GPTNEOX,
}
K_QUANTS = (Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K)


def write_model(path: Path, model: Any, kind: Type = Type.F32, **fields: Any) -> Path:
    """A model's GGUF file; matrices of `kind` where its blocks divide their rows, the rest F32. `fields` are added to the metadata.

    The torch model is changed to hold what the file holds after quantisation.
    """
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _write_config(writer, config)
    _write_tokenizer(writer, config.vocab_size)
    for key, value in fields.items():
        writer.add_key_value(key, value, _type_of(value))
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        array = tensor.numpy()
        is_conv1d = config.model_type == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        array = np.ascontiguousarray(array.T) if is_conv1d else array
        block = gguf.GGML_QUANT_SIZES[kind][0]
        used = kind if array.ndim == 2 and array.shape[1] % block == 0 and "position" not in new else Type.F32
        stored = _random_bytes(array, used, len(name)) if used in K_QUANTS else quantize(array, used)
        rounded = dequantize(stored, used)
        tensor.copy_(tensor.new_tensor(rounded.T if is_conv1d else rounded))
        writer.add_tensor(new, np.ascontiguousarray(_reorder(stored, name, config)), raw_dtype=used)
    if config.model_type == "llama" and config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", np.array(_llama3_factors(config), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _random_bytes(array: np.ndarray, kind: Type, seed: int) -> np.ndarray:
    """The `gguf` package reads K-quants but can't make them: any bytes whose scales are small numbers."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return np.random.default_rng(seed).integers(0, 28, (len(array), array.shape[1] // block * size), dtype=np.uint8)


def _write_config(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type == "gpt_neox":
        writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * size))
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_layer_norm_eps(config.layer_norm_eps)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type != "qwen2":
        writer.add_key_length(size)
        writer.add_value_length(size)
    if config.model_type == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(size)


def _write_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """transformers takes the size of the vocabulary from here."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet())[: vocab_size - 1], "ab"])
    writer.add_token_merges(["a b"])


def _reorder(rows: np.ndarray, name: str, config: Any) -> np.ndarray:
    """Rows in llama.cpp's order; those of quantised arrays are bytes, and move whole."""
    rest = rows.shape[1:]
    if config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        return rows.reshape(heads, 2, -1, *rest).swapaxes(1, 2).reshape(rows.shape)
    if ".query_key_value." in name:
        heads = rows.reshape(config.num_attention_heads, 3, -1, *rest)
        return np.concatenate([heads[:, part].reshape(-1, *rest) for part in range(3)])
    return rows


def _llama3_factors(config: Any) -> list[float]:
    """By wavelength, as llama.cpp's LlamaModel has it."""
    rope = config.rope_parameters
    low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for place in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (place / config.head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return factors


def _type_of(value: Any) -> gguf.GGUFValueType:
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    return kinds.get(type(value), gguf.GGUFValueType.get_type(value))
