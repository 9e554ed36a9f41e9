"""GGUF files, dequantised by the `gguf` package, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize

from pjax.errors import CheckpointError, UnsupportedError
from pjax.gguf_header import TensorInfo, read_gguf_header
from pjax.models.checkpoints.base import Checkpoint

SUPPORTED = (
    *(Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1),
    *(Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K),
)
PLAIN = {Type.F32: np.dtype(np.float32), Type.F16: np.dtype(np.float16), Type.BF16: np.dtype(ml_dtypes.bfloat16)}
CHUNK_ELEMENTS = 1 << 18  # dequantised at once: temporaries that stay in the cache
# Fields of architecture llama that are applied here, or that change no forward pass.
APPLIED = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "tensor_data_layout",
    "vocab_size",
}
FACTOR_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class GGUFFile(Checkpoint):
    """A .gguf file of architecture llama.

    Raises CheckpointError when the file is damaged or truncated, UnsupportedError when it is big-endian or one of several parts.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_gguf_header(path)
        self._metadata, self._tensors = header.metadata, header.tensors
        if (parts := self._metadata.get("split.count", 0)) > 1:
            raise UnsupportedError(f"{path} is one of {parts} parts; supported: a single GGUF file (llama-gguf-split --merge)")
        self._data = np.memmap(path, np.uint8, mode="r")
        for name, info in self._tensors.items():
            end = info.offset + math.prod(self._byte_shape(name, info))
            if end > self._data.size:
                raise CheckpointError(
                    f"{path} is damaged or truncated: tensor {name} ends at byte {end}, but the file has {self._data.size}"
                )

    def hf_config(self) -> dict[str, Any]:
        """config.json as transformers would write it for the same model.

        Raises CheckpointError when a field is missing or wrong, UnsupportedError when one is not applied by pjax.
        """
        return llama_config(self._metadata, self.names(), self.path)

    def generation_config(self) -> dict[str, Any]:
        """GGUF has none."""
        return {}

    def names(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor; GGUF's fastest axis comes last here."""
        return {name: info.shape for name, info in self._tensors.items()}

    def dtypes(self) -> dict[str, str]:
        """What `read` gives: dequantised tensors are float32."""
        return {name: PLAIN.get(Type(info.kind), np.dtype(np.float32)).name for name, info in self._tensors.items()}

    def _byte_shape(self, name: str, info: TensorInfo) -> tuple[int, ...]:
        """A tensor's shape with its last axis in bytes."""
        try:
            kind = Type(info.kind)
        except ValueError:
            raise UnsupportedError(f"{self.path}: tensor {name} has the unknown type {info.kind}") from None
        if kind not in SUPPORTED:
            raise UnsupportedError(f"{self.path}: tensor {name} is {kind.name}; supported: {', '.join(t.name for t in SUPPORTED)}")
        block, size = GGML_QUANT_SIZES[kind]
        if info.shape[-1] % block:
            raise CheckpointError(f"{self.path}: tensor {name} has rows of {info.shape[-1]}, but {kind.name} packs {block} at a time")
        return (*info.shape[:-1], info.shape[-1] // block * size)

    def read(self, name: str) -> np.ndarray:
        """One tensor: F32, F16 and BF16 are views of the mapped file, the rest is dequantised to float32.

        Query and key weights of llama keep GGUF's order of rotary pairs.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        info = self._tensors[name]
        shape, kind, byte_shape = info.shape, Type(info.kind), self._byte_shape(name, info)
        data = np.asarray(self._data[info.offset : info.offset + math.prod(byte_shape)])
        if kind in PLAIN:
            return data.view(PLAIN[kind]).reshape(shape)
        values = np.empty(math.prod(shape), np.float32)
        block, size = GGML_QUANT_SIZES[kind]
        step = CHUNK_ELEMENTS // block
        for start in range(0, len(values) // block, step):  # as one long row, which `dequantize` takes in one piece
            part = data[start * size : (start + step) * size]
            values[start * block : (start + step) * block] = dequantize(part, kind)
        return values.reshape(shape)

    def close(self) -> None:
        """Forgets the tensors; the file is unmapped with the last array that views it."""
        self._tensors = {}


class _Fields:
    """Metadata with checks; keys without the `llama.` in front."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self._metadata = metadata
        self.path = path

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default."""
        return self._metadata.get(f"llama.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        """A number; CheckpointError when it is missing or none, UnsupportedError when every layer has its own."""
        value = self.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path} has no metadata field llama.{key}")
        if isinstance(value, list):
            raise UnsupportedError(f"{self.path}: llama.{key} is {value}, one a layer; supported: one number for all layers")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.path}: llama.{key} is {value!r}, but must be a number")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer >= 1; errors as in `number`."""
        value = self.number(key, default)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.path}: llama.{key} is {value!r}, but must be an integer >= 1")
        return value


def llama_config(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Any]:
    """config.json as transformers would write it for a GGUF file of architecture llama.

    Args:
      metadata: the file's fields, names with their prefixes.
      shapes: of its tensors, slowest axis first.
      path: for messages.
    Raises CheckpointError when a field is missing or wrong, UnsupportedError when one changes what pjax does not apply.
    """
    _refuse(metadata, shapes, path)
    fields = _Fields(metadata, path)
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_size = fields.integer("attention.key_length", hidden // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if (value := fields.integer(key, head_size)) != head_size:
            raise UnsupportedError(f"{path}: llama.{key} is {value}; supported: the head size {head_size}")
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise CheckpointError(f"{path} has no two-dimensional tensor token_embd.weight")
    biased = {name.split(".")[-2].split("_")[0] for name in shapes if name.startswith("blk.") and name.endswith(".bias")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_size,
        "max_position_embeddings": fields.integer("context_length"),
        "vocab_size": shapes["token_embd.weight"][0],
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(fields),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "attn" in biased,
        "mlp_bias": "ffn" in biased,
        "hidden_act": "silu",
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32",
    }


def _refuse(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    architecture = metadata.get("general.architecture")
    if architecture is None:
        raise CheckpointError(f"{path} has no metadata field general.architecture")
    if architecture != "llama":
        raise UnsupportedError(f"{path}: GGUF architecture {architecture!r} is not supported; supported: llama")
    for name in FACTOR_TENSORS:
        if name in shapes:
            raise UnsupportedError(f"{path}: tensor {name} (llama3 or longrope rotary scaling in GGUF) is not supported; use safetensors")
    if metadata.get("llama.expert_count"):
        raise UnsupportedError(f"{path}: llama.expert_count is {metadata['llama.expert_count']}; supported: dense models")
    unknown = sorted(key for key in metadata if key.startswith("llama.") and key.removeprefix("llama.") not in APPLIED)
    if unknown:
        values = ", ".join(f"{key}={metadata[key]!r}" for key in unknown)
        raise UnsupportedError(f"{path} has metadata fields that pjax does not apply: {values}")


def _rope_scaling(fields: _Fields) -> dict[str, Any] | None:
    """As llama.cpp reads it: a factor without a type scales linearly, and no factor or 0 means no scaling."""
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 0.0))
    kind = fields.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"{fields.path}: llama.rope.scaling.type is {kind!r}; supported: none, linear, yarn")
    if kind == "none" or factor in (0, 1):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if (original := fields.get("rope.scaling.original_context_length")) is not None:
        scaling["original_max_position_embeddings"] = original
    if kind == "yarn":
        for key in ("beta_fast", "beta_slow"):
            if (value := fields.get(f"rope.scaling.yarn_{key}")) is not None:
                scaling[key] = value
    return scaling
