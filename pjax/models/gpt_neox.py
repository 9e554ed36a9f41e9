"""GPT-NeoX (Black et al. 2022), Pythia and Dolly v2: rotary positions on a part of each head, attention and MLP in parallel."""

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
from pjax.layers.attention import PagedContext
from pjax.layers.linear import ACTIVATIONS, MLP, Embedding, Linear, head_logits
from pjax.layers.norms import LayerNorm
from pjax.layers.rope import RopeConfig, rotate, rotation
from pjax.layers.stack import LayerStack
from pjax.models.hf_config import ConfigReader, MultiHeadConfig, read_rope

PREFIX = "gpt_neox."
OTHER_NAMES = {"embed_out.weight": "lm_head.weight"}  # transformers 4


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(MultiHeadConfig):
    """What is its own."""

    layer_norm_epsilon: float
    rope: RopeConfig
    attention_bias: bool
    parallel: bool  # attention and MLP read the same input

    @property
    def rotary_size(self) -> int:
        """How much of a head is rotated."""
        return int(self.head_size * self.rope.fraction)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> GPTNeoXConfig:
        """From config.json's content. Raises CheckpointError for bad values, UnsupportedError for what is not applied."""
        config = ConfigReader(hf, "gpt_neox")
        hidden_size = config.integer("hidden_size")
        max_position = config.integer("max_position_embeddings", 2048)
        rope = read_rope(config, max_position, theta_key="rotary_emb_base", fraction_key="rotary_pct")
        made = cls(
            vocab_size=config.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=config.integer("intermediate_size"),
            num_layers=config.integer("num_hidden_layers"),
            num_heads=(num_heads := config.divisor("num_attention_heads", "hidden_size")),
            head_size=hidden_size // num_heads,
            max_position=rope.scaled_length(max_position),
            layer_norm_epsilon=config.number("layer_norm_eps", 1e-5),
            rope=rope,
            activation=config.only("hidden_act", ACTIVATIONS, "gelu"),
            attention_bias=config.flag("attention_bias", True),
            parallel=config.flag("use_parallel_residual", True),
            tied=config.flag("tie_word_embeddings"),
        )
        if made.rotary_size < 2 or made.rotary_size % 2:
            raise CheckpointError(
                f"gpt_neox config: rotary_pct is {made.rope.fraction}, which rotates {made.rotary_size} of the {made.head_size} "
                "elements of a head, but must rotate an even number of them"
            )
        config.finish()
        return made


class GPTNeoXAttention(nnx.Module):
    """Multi-head attention with rotary positions; queries, keys and values of one head stand side by side in the product."""

    def __init__(self, config: GPTNeoXConfig, *, dtype: Any) -> None:
        self.config = config
        width = config.num_heads * config.head_size
        self.qkv = Linear(config.hidden_size, 3 * width, bias=config.attention_bias, axes=("heads", "embed"), dtype=dtype)
        self.out = Linear(width, config.hidden_size, bias=config.attention_bias, axes=("embed", "heads"), dtype=dtype)

    def __call__(
        self, x: jax.Array, pages: jax.Array, layer: int | jax.Array, context: PagedContext, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """x [T, D] to ([T, D], pages)."""
        config = self.config
        heads = self.qkv(x).reshape(x.shape[0], config.num_heads, 3, config.head_size)
        q, k, v = rotate(heads[:, :, 0], *rope), rotate(heads[:, :, 1], *rope), heads[:, :, 2]
        out, pages = context.attend(pages, q, k, v, layer)
        return self.out(out.reshape(x.shape[0], -1)), pages


class GPTNeoXBlock(nnx.Module):
    """Pre-norm residual block, in parallel (x + attention(x) + mlp(x)) or in sequence."""

    def __init__(self, config: GPTNeoXConfig, *, dtype: Any) -> None:
        self.parallel = config.parallel
        self.attention_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_epsilon, dtype=dtype)
        self.attention = GPTNeoXAttention(config, dtype=dtype)
        self.mlp_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_epsilon, dtype=dtype)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, activation=config.activation, bias=True, dtype=dtype)

    def __call__(
        self, x: jax.Array, pages: jax.Array, layer: int | jax.Array, context: PagedContext, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """x [T, D] to ([T, D], pages)."""
        attended, pages = self.attention(self.attention_norm(x), pages, layer, context, rope)
        if self.parallel:
            return x + attended + self.mlp(self.mlp_norm(x)), pages
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), pages


class GPTNeoX(nnx.Module):
    """Token ids to hidden states over the page pool, and hidden states to logits."""

    def __init__(self, config: GPTNeoXConfig, *, dtype: Any = jnp.float32, layer_mode: str = "unroll") -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, axis="vocab", dtype=dtype)
        self.blocks = LayerStack(lambda: GPTNeoXBlock(config, dtype=dtype), config.num_layers, mode=layer_mode, rows_are_tokens=True)
        self.norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_epsilon, dtype=dtype)
        self.head = None if config.tied else Linear(config.hidden_size, config.vocab_size, axes=("vocab", "embed"), dtype=dtype)

    def __call__(self, token_ids: jax.Array, pages: jax.Array, context: PagedContext) -> tuple[jax.Array, jax.Array]:
        """int32 [T] to hidden states [T, D] (before the last norm) and the pages with the tokens' K and V written."""
        rope = rotation(self.config.rope, self.config.rotary_size, context.positions)

        return self.blocks(self.embed(token_ids), pages, context, rope)

    def logits(self, hidden: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        """[S, D] to float32 [S, V]."""
        return head_logits(self.norm(hidden), self.head, self.embed, num_rows)


def weight_table(config: GPTNeoXConfig) -> dict[str, Weight]:
    """Each parameter of `GPTNeoX` by its path, and the Hugging Face tensors that make it. `{}` is the layer."""
    hidden, wide, bias = config.hidden_size, config.intermediate_size, config.attention_bias
    layer = "gpt_neox.layers.{}."
    table = {
        "embed.table": Weight.plain("gpt_neox.embed_in.weight", (config.vocab_size, hidden)),
        "blocks.{}.attention_norm.scale": Weight.plain(layer + "input_layernorm.weight", (hidden,)),
        "blocks.{}.attention_norm.bias": Weight.plain(layer + "input_layernorm.bias", (hidden,)),
        "blocks.{}.attention.qkv": Weight.linear(hidden, (layer + "attention.query_key_value", 3 * hidden), bias=bias),
        "blocks.{}.attention.out": Weight.linear(hidden, (layer + "attention.dense", hidden), bias=bias),
        "blocks.{}.mlp_norm.scale": Weight.plain(layer + "post_attention_layernorm.weight", (hidden,)),
        "blocks.{}.mlp_norm.bias": Weight.plain(layer + "post_attention_layernorm.bias", (hidden,)),
        "blocks.{}.mlp.up": Weight.linear(hidden, (layer + "mlp.dense_h_to_4h", wide), bias=True),
        "blocks.{}.mlp.down": Weight.linear(wide, (layer + "mlp.dense_4h_to_h", hidden), bias=True),
        "norm.scale": Weight.plain("gpt_neox.final_layer_norm.weight", (hidden,)),
        "norm.bias": Weight.plain("gpt_neox.final_layer_norm.bias", (hidden,)),
    }
    if not config.tied:
        table["head"] = Weight.linear(hidden, ("lm_head", config.vocab_size))
    return table


def known_leftovers(config: GPTNeoXConfig) -> tuple[str, ...]:
    """Regular expressions of tensors that checkpoints carry and the model does not read."""
    buffers = r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)"
    return (buffers, r"lm_head\.weight") if config.tied else (buffers,)


GGUF_NAMES = {
    "gpt_neox.embed_in.": "token_embd.",
    "gpt_neox.final_layer_norm.": "output_norm.",
    "lm_head.": "output.",
    "gpt_neox.layers.": "blk.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".attention.query_key_value.": ".attn_qkv.",
    ".attention.dense.": ".attn_output.",
    ".mlp.dense_h_to_4h.": ".ffn_up.",
    ".mlp.dense_4h_to_h.": ".ffn_down.",
}


def from_gguf(name: str, array: np.ndarray, config: GPTNeoXConfig, model_type: str) -> np.ndarray:
    """A tensor read from GGUF in Hugging Face's order: GGUF has the queries of all heads, then all keys, then all values."""
    if ".query_key_value." not in name:
        return array
    heads = array.reshape(3, config.num_heads, config.head_size, *array.shape[1:])
    return heads.swapaxes(0, 1).reshape(array.shape)


Config, Model = GPTNeoXConfig, GPTNeoX
