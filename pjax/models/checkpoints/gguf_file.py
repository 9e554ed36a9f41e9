"""GGUF files, read and dequantised by the `gguf` package, one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from gguf.quants import dequantize

from pjax.errors import CheckpointError, UnsupportedError
from pjax.models.checkpoints.base import Checkpoint

SUPPORTED = (
    *(Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1),
    *(Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K),
)


def open_gguf(path: Path) -> GGUFReader:
    """The reader; CheckpointError names the file when it is damaged."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise CheckpointError(f"{path} is no GGUF file: it begins with {magic!r}, but must begin with b'GGUF'")
        return GGUFReader(path)
    except CheckpointError:
        raise
    except Exception as error:  # the reader indexes past the end of truncated files in many ways
        raise CheckpointError(f"{path} is damaged or truncated: {error!r}") from error


class GGUFFile(Checkpoint):
    """A .gguf file of architecture llama."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = open_gguf(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        size = path.stat().st_size
        for tensor in self._reader.tensors:
            end = int(tensor.data_offset) + int(tensor.n_bytes)
            if end > size:
                raise CheckpointError(f"{path} is truncated: tensor {tensor.name} ends at byte {end}, but the file has {size}")

    def field(self, key: str, default: Any = None) -> Any:
        """A metadata value, or the default."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def _required(self, key: str) -> Any:
        value = self.field(key)
        if value is None:
            raise CheckpointError(f"{self.path} has no metadata field {key}")
        return value

    def hf_config(self) -> dict[str, Any]:
        """config.json as transformers would write it for the same model."""
        architecture = self._required("general.architecture")
        if architecture != "llama":
            raise UnsupportedError(f"{self.path}: GGUF architecture {architecture!r} is not supported; supported: llama")
        if "rope_freqs.weight" in self._tensors:
            raise UnsupportedError(f"{self.path}: tensor rope_freqs.weight (llama3 rotary scaling in GGUF) is not supported")
        if int(self.field("llama.expert_count", 0)) > 0:
            raise UnsupportedError(f"{self.path}: llama.expert_count is {self.field('llama.expert_count')}; supported: dense models")
        hidden, heads = int(self._required("llama.embedding_length")), int(self._required("llama.attention.head_count"))
        head_size = int(self.field("llama.attention.key_length", hidden // heads))
        rotary = int(self.field("llama.rope.dimension_count", head_size))
        if rotary != head_size:
            raise UnsupportedError(f"{self.path}: llama.rope.dimension_count is {rotary}; supported: the head size {head_size}")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": int(self._required("llama.feed_forward_length")),
            "num_hidden_layers": int(self._required("llama.block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self.field("llama.attention.head_count_kv", heads)),
            "head_dim": head_size,
            "max_position_embeddings": int(self._required("llama.context_length")),
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in self._tensors else 1,
            "rms_norm_eps": float(self._required("llama.attention.layer_norm_rms_epsilon")),
            "rope_theta": float(self.field("llama.rope.freq_base", 10000.0)),
            "rope_scaling": self._rope_scaling(),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in self._tensors,
            "hidden_act": "silu",
            "bos_token_id": self.field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.field("tokenizer.ggml.eos_token_id"),
            "torch_dtype": "float32",
        }

    def _rope_scaling(self) -> dict[str, Any] | None:
        kind = self.field("llama.rope.scaling.type", "none")
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": float(self._required("llama.rope.scaling.factor"))}
        original = self.field("llama.rope.scaling.original_context_length")
        return scaling | ({"original_max_position_embeddings": int(original)} if original else {})

    def generation_config(self) -> dict[str, Any]:
        """GGUF has none."""
        return {}

    def names(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor; GGUF's fastest axis comes last here."""
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor: F32, F16 and BF16 as they are, the rest dequantised to float32."""
        tensor = self._tensors[name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        kind = tensor.tensor_type
        if kind not in SUPPORTED:
            names = ", ".join(t.name for t in SUPPORTED)
            raise UnsupportedError(f"{self.path}: tensor {name} is {kind.name}; supported: {names}")
        if kind is Type.BF16:
            return np.asarray(tensor.data).view(ml_dtypes.bfloat16).reshape(shape)
        if kind in (Type.F32, Type.F16):
            return np.asarray(tensor.data).reshape(shape)
        return np.asarray(dequantize(tensor.data, kind), np.float32).reshape(shape)
