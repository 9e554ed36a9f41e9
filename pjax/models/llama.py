"""LLaMA (Touvron et al. 2023) and what shares its shape: Llama 2 and 3, TinyLlama, SmolLM2, Mistral, Qwen 2 and 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pjax.checkpoints.weights import Weight
from pjax.errors import CheckpointError
from pjax.layers.attention import LayerOptions, PagedContext
from pjax.layers.linear import ACTIVATIONS, Embedding, Linear, head_logits
from pjax.layers.norms import RMSNorm
from pjax.layers.rope import RopeConfig, rotate, rotation
from pjax.layers.stack import LayerStack
from pjax.models.hf_config import ConfigReader, read_rope

PREFIX = "model."
OTHER_NAMES: dict[str, str] = {}
LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes are named as in docs/shapes.md."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_size: int  # H
    max_position: int
    rms_norm_epsilon: float
    rope: RopeConfig
    activation: str
    attention_bias: bool  # of queries, keys and values
    out_bias: bool
    mlp_bias: bool
    head_norm: bool  # queries and keys are normed head by head (Qwen 3)
    sliding_window: int | tuple[int | None, ...] | None  # one for each layer where they differ
    tied: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> LlamaConfig:
        """From config.json's content. Raises CheckpointError for bad values, UnsupportedError for what is not applied."""
        kind = hf.get("model_type", "llama")
        config = ConfigReader(hf, str(kind))
        hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
        max_position = config.integer("max_position_embeddings", 2048)
        rope = read_rope(config, max_position)
        config.only("pretraining_tp", (1,), 1)
        config.only("use_mrope", (False,), False)
        attention_bias = config.flag("attention_bias")
        made = cls(
            vocab_size=config.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=config.integer("intermediate_size"),
            num_layers=config.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=config.divisor("num_key_value_heads", "num_attention_heads", num_heads),
            head_size=config.integer("head_dim", hidden_size // num_heads),
            max_position=rope.scaled_length(max_position),
            rms_norm_epsilon=config.number("rms_norm_eps", 1e-6),
            rope=rope,
            activation=config.only("hidden_act", ACTIVATIONS, "silu"),
            attention_bias=attention_bias or kind == "qwen2",
            out_bias=attention_bias,
            mlp_bias=config.flag("mlp_bias"),
            head_norm=kind == "qwen3",
            sliding_window=_window(config, str(kind)),
            tied=config.flag("tie_word_embeddings"),
        )
        if made.head_size % 2:
            raise CheckpointError(f"{kind} config: head_dim is {made.head_size}, but must be even")
        config.finish()
        return made


def _window(config: ConfigReader, kind: str) -> int | tuple[int | None, ...] | None:
    """The sliding window. A llama has none; a mistral has one; a qwen has one that may be off, or for some layers."""
    if kind not in ("mistral", "qwen2", "qwen3"):
        return None
    window = None if config.get("sliding_window") is None else config.integer("sliding_window")
    num_layers, first = config.integer("num_hidden_layers"), config.get("max_window_layers", 0)
    types = config.get("layer_types")
    if types is not None and not (isinstance(types, list) and len(types) == num_layers and set(types) <= LAYER_TYPES):
        raise CheckpointError(f"{kind} config: layer_types is {types!r}, but must be {num_layers} of {', '.join(sorted(LAYER_TYPES))}")
    if kind != "mistral" and not config.flag("use_sliding_window"):
        window = None
    if window is None:
        return None
    slides = [kind == "sliding_attention" for kind in types] if types else [layer >= first for layer in range(num_layers)]
    if any(slides) and not all(slides):
        return tuple(window if is_sliding else None for is_sliding in slides)
    return window if all(slides) else None


class LlamaAttention(nnx.Module):
    """Grouped-query attention with rotary positions; one product makes queries, keys and values."""

    def __init__(self, config: LlamaConfig, *, dtype: Any) -> None:
        self.config = config
        q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        axes = ((("heads", q), ("kv_heads", kv), ("kv_heads", kv)), "embed")
        self.qkv = Linear(config.hidden_size, q + 2 * kv, bias=config.attention_bias, axes=axes, dtype=dtype)
        self.out = Linear(q, config.hidden_size, bias=config.out_bias, axes=("embed", "heads"), dtype=dtype)
        self.q_norm = RMSNorm(config.head_size, epsilon=config.rms_norm_epsilon, dtype=dtype) if config.head_norm else None
        self.k_norm = RMSNorm(config.head_size, epsilon=config.rms_norm_epsilon, dtype=dtype) if config.head_norm else None

    def __call__(
        self, x: jax.Array, pages: jax.Array, layer: int | jax.Array, context: PagedContext, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """x [T, D] to ([T, D], pages)."""
        config = self.config
        num_q, num_kv = config.num_heads, config.num_kv_heads
        heads = self.qkv(x).reshape(x.shape[0], num_q + 2 * num_kv, config.head_size)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = jnp.split(heads, [num_q, num_q + num_kv], axis=1)
            heads = jnp.concatenate([self.q_norm(q), self.k_norm(k), v], axis=1)
        turned = rotate(heads[:, : num_q + num_kv], *rope)
        q, k, v = turned[:, :num_q], turned[:, num_q:], heads[:, num_q + num_kv :]
        out, pages = context.attend(pages, q, k, v, layer, LayerOptions(sliding_window=config.sliding_window))
        return self.out(out.reshape(x.shape[0], num_q * config.head_size)), pages


class LlamaMLP(nnx.Module):
    """down(act(gate(x)) · up(x)); one product makes gate and up (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig, *, dtype: Any) -> None:
        self.activation = config.activation
        hidden, wide, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up = Linear(hidden, 2 * wide, bias=bias, axes=((("ffn", wide), ("ffn", wide)), "embed"), dtype=dtype)
        self.down = Linear(wide, hidden, bias=bias, axes=("embed", "ffn"), dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, D] to [T, D]."""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(ACTIVATIONS[self.activation](gate) * up)


class LlamaBlock(nnx.Module):
    """Pre-norm residual block."""

    def __init__(self, config: LlamaConfig, *, dtype: Any) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_epsilon, dtype=dtype)
        self.attention = LlamaAttention(config, dtype=dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_epsilon, dtype=dtype)
        self.mlp = LlamaMLP(config, dtype=dtype)

    def __call__(
        self, x: jax.Array, pages: jax.Array, layer: int | jax.Array, context: PagedContext, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """x [T, D] to ([T, D], pages)."""
        attended, pages = self.attention(self.attention_norm(x), pages, layer, context, rope)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), pages


class Llama(nnx.Module):
    """Token ids to hidden states over the page pool, and hidden states to logits."""

    def __init__(self, config: LlamaConfig, *, dtype: Any = jnp.float32, layer_mode: str = "unroll") -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, axis="vocab", dtype=dtype)
        self.blocks = LayerStack(lambda: LlamaBlock(config, dtype=dtype), config.num_layers, mode=layer_mode, rows_are_tokens=True)
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_epsilon, dtype=dtype)
        self.head = None if config.tied else Linear(config.hidden_size, config.vocab_size, axes=("vocab", "embed"), dtype=dtype)

    def __call__(self, token_ids: jax.Array, pages: jax.Array, context: PagedContext) -> tuple[jax.Array, jax.Array]:
        """int32 [T] to hidden states [T, D] (before the last norm) and the pages with the tokens' K and V written."""
        rope = rotation(self.config.rope, self.config.head_size, context.positions)

        return self.blocks(self.embed(token_ids), pages, context, rope)

    def logits(self, hidden: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        """[S, D] to float32 [S, V]."""
        return head_logits(self.norm(hidden), self.head, self.embed, num_rows)


def weight_table(config: LlamaConfig) -> dict[str, Weight]:
    """Each parameter of `Llama` by its path, and the Hugging Face tensors that make it. `{}` is the layer."""
    hidden, wide, size = config.hidden_size, config.intermediate_size, config.head_size
    q, kv = config.num_heads * size, config.num_kv_heads * size
    attention, mlp = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
    qkv = ((attention + "q_proj", q), (attention + "k_proj", kv), (attention + "v_proj", kv))
    gate_up = ((mlp + "gate_proj", wide), (mlp + "up_proj", wide))
    table = {
        "embed.table": Weight.plain("model.embed_tokens.weight", (config.vocab_size, hidden)),
        "blocks.{}.attention_norm.scale": Weight.plain("model.layers.{}.input_layernorm.weight", (hidden,)),
        "blocks.{}.attention.qkv": Weight.linear(hidden, *qkv, bias=config.attention_bias),
        "blocks.{}.attention.out": Weight.linear(q, (attention + "o_proj", hidden), bias=config.out_bias),
        "blocks.{}.mlp_norm.scale": Weight.plain("model.layers.{}.post_attention_layernorm.weight", (hidden,)),
        "blocks.{}.mlp.gate_up": Weight.linear(hidden, *gate_up, bias=config.mlp_bias),
        "blocks.{}.mlp.down": Weight.linear(wide, (mlp + "down_proj", hidden), bias=config.mlp_bias),
        "norm.scale": Weight.plain("model.norm.weight", (hidden,)),
    }
    if config.head_norm:
        table["blocks.{}.attention.q_norm.scale"] = Weight.plain(attention + "q_norm.weight", (size,))
        table["blocks.{}.attention.k_norm.scale"] = Weight.plain(attention + "k_norm.weight", (size,))
    if not config.tied:
        table["head"] = Weight.linear(hidden, ("lm_head", config.vocab_size))
    return table


def known_leftovers(config: LlamaConfig) -> tuple[str, ...]:
    """Regular expressions of tensors that checkpoints carry and the model does not read."""
    inverse_frequencies = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    return (inverse_frequencies, r"lm_head\.weight") if config.tied else (inverse_frequencies,)


GGUF_NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".self_attn.q_norm.": ".attn_q_norm.",
    ".self_attn.k_norm.": ".attn_k_norm.",
    ".self_attn.q_proj.": ".attn_q.",
    ".self_attn.k_proj.": ".attn_k.",
    ".self_attn.v_proj.": ".attn_v.",
    ".self_attn.o_proj.": ".attn_output.",
    ".mlp.gate_proj.": ".ffn_gate.",
    ".mlp.up_proj.": ".ffn_up.",
    ".mlp.down_proj.": ".ffn_down.",
}


def from_gguf(name: str, array: np.ndarray, config: LlamaConfig, model_type: str) -> np.ndarray:
    """A tensor read from GGUF in Hugging Face's order: in a llama (and no qwen) GGUF interleaves the rotary pairs of q and k."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    if heads is None or model_type != "llama":
        return array
    rows = np.arange(len(array)).reshape(heads, config.head_size // 2, 2).swapaxes(1, 2).reshape(-1)
    return array[rows]


Config, Model = LlamaConfig, Llama
