"""GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, a tied head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pjax.checkpoints.weights import Weight
from pjax.layers.attention import LayerOptions, PagedContext
from pjax.layers.linear import ACTIVATIONS, MLP, Embedding, Linear, head_logits
from pjax.layers.norms import LayerNorm
from pjax.layers.stack import LayerStack
from pjax.models.hf_config import ConfigReader, MultiHeadConfig

PREFIX = "transformer."  # the files that OpenAI published do without
OTHER_NAMES: dict[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class GPT2Config(MultiHeadConfig):
    """What is its own."""

    layer_norm_epsilon: float
    scaled: bool  # logits are divided by the root of the head size
    scaled_by_layer: bool  # and by the layer's number, from 1

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> GPT2Config:
        """From config.json's content. Raises CheckpointError for bad values, UnsupportedError for what is not applied."""
        config = ConfigReader(hf, "gpt2")
        hidden_size = config.integer("n_embd", 768)
        config.only("add_cross_attention", (False,), False)
        config.flag("reorder_and_upcast_attn")  # against overflow in float16; logits are float32 here anyway
        made = cls(
            vocab_size=config.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=config.integer("n_inner", 4 * hidden_size),
            num_layers=config.integer("n_layer", 12),
            num_heads=(num_heads := config.divisor("n_head", "n_embd", 12)),
            head_size=hidden_size // num_heads,
            max_position=config.integer("n_positions", 1024),
            layer_norm_epsilon=config.number("layer_norm_epsilon", 1e-5),
            activation=config.only("activation_function", ACTIVATIONS, "gelu_new"),
            scaled=config.flag("scale_attn_weights", True),
            scaled_by_layer=config.flag("scale_attn_by_inverse_layer_idx"),
            tied=config.flag("tie_word_embeddings", True),
        )
        config.finish()
        return made


class GPT2Attention(nnx.Module):
    """Multi-head attention; one product makes queries, keys and values."""

    def __init__(self, config: GPT2Config, *, dtype: Any) -> None:
        self.config = config
        width = config.num_heads * config.head_size
        self.qkv = Linear(config.hidden_size, 3 * width, bias=True, axes=((("heads", width),) * 3, "embed"), dtype=dtype)
        self.out = Linear(width, config.hidden_size, bias=True, axes=("embed", "heads"), dtype=dtype)

    def __call__(self, x: jax.Array, pages: jax.Array, layer: int | jax.Array, context: PagedContext) -> tuple[jax.Array, jax.Array]:
        """x [T, D] to ([T, D], pages)."""
        config = self.config
        heads = self.qkv(x).reshape(x.shape[0], 3, config.num_heads, config.head_size)
        q, k, v = heads[:, 0], heads[:, 1], heads[:, 2]
        if config.scaled_by_layer:
            q = (q.astype(jnp.float32) / jnp.asarray(layer + 1, jnp.float32)).astype(q.dtype)
        out, pages = context.attend(pages, q, k, v, layer, LayerOptions(scale=None if config.scaled else 1.0))
        return self.out(out.reshape(x.shape[0], -1)), pages


class GPT2Block(nnx.Module):
    """Pre-norm residual block."""

    def __init__(self, config: GPT2Config, *, dtype: Any) -> None:
        self.attention_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_epsilon, dtype=dtype)
        self.attention = GPT2Attention(config, dtype=dtype)
        self.mlp_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_epsilon, dtype=dtype)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, activation=config.activation, bias=True, dtype=dtype)

    def __call__(self, x: jax.Array, pages: jax.Array, layer: int | jax.Array, context: PagedContext) -> tuple[jax.Array, jax.Array]:
        """x [T, D] to ([T, D], pages)."""
        attended, pages = self.attention(self.attention_norm(x), pages, layer, context)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), pages


class GPT2(nnx.Module):
    """Token ids to hidden states over the page pool, and hidden states to logits."""

    def __init__(self, config: GPT2Config, *, dtype: Any = jnp.float32, layer_mode: str = "unroll") -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, axis="vocab", dtype=dtype)
        self.positions = Embedding(config.max_position, config.hidden_size, dtype=dtype)
        self.blocks = LayerStack(lambda: GPT2Block(config, dtype=dtype), config.num_layers, mode=layer_mode, rows_are_tokens=True)
        self.norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_epsilon, dtype=dtype)
        self.head = None if config.tied else Linear(config.hidden_size, config.vocab_size, axes=("vocab", "embed"), dtype=dtype)

    def __call__(self, token_ids: jax.Array, pages: jax.Array, context: PagedContext) -> tuple[jax.Array, jax.Array]:
        """int32 [T] to hidden states [T, D] (before the last norm) and the pages with the tokens' K and V written."""

        return self.blocks(self.embed(token_ids) + self.positions(context.positions), pages, context)

    def logits(self, hidden: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        """[S, D] to float32 [S, V]."""
        return head_logits(self.norm(hidden), self.head, self.embed, num_rows)


def weight_table(config: GPT2Config) -> dict[str, Weight]:
    """Each parameter of `GPT2` by its path, and the Hugging Face tensors that make it. `{}` is the layer."""
    hidden, wide = config.hidden_size, config.intermediate_size
    layer = "transformer.h.{}."
    table = {
        "embed.table": Weight.plain("transformer.wte.weight", (config.vocab_size, hidden)),
        "positions.table": Weight.plain("transformer.wpe.weight", (config.max_position, hidden)),
        "blocks.{}.attention_norm.scale": Weight.plain(layer + "ln_1.weight", (hidden,)),
        "blocks.{}.attention_norm.bias": Weight.plain(layer + "ln_1.bias", (hidden,)),
        "blocks.{}.attention.qkv": Weight.conv1d(hidden, layer + "attn.c_attn", 3 * hidden),
        "blocks.{}.attention.out": Weight.conv1d(hidden, layer + "attn.c_proj", hidden),
        "blocks.{}.mlp_norm.scale": Weight.plain(layer + "ln_2.weight", (hidden,)),
        "blocks.{}.mlp_norm.bias": Weight.plain(layer + "ln_2.bias", (hidden,)),
        "blocks.{}.mlp.up": Weight.conv1d(hidden, layer + "mlp.c_fc", wide),
        "blocks.{}.mlp.down": Weight.conv1d(wide, layer + "mlp.c_proj", hidden),
        "norm.scale": Weight.plain("transformer.ln_f.weight", (hidden,)),
        "norm.bias": Weight.plain("transformer.ln_f.bias", (hidden,)),
    }
    if not config.tied:
        table["head"] = Weight.linear(hidden, ("lm_head", config.vocab_size))
    return table


def known_leftovers(config: GPT2Config) -> tuple[str, ...]:
    """Regular expressions of tensors that checkpoints carry and the model does not read."""
    masks = r"transformer\.h\.\d+\.attn\.(masked_)?bias"
    return (masks, r"lm_head\.weight") if config.tied else (masks,)


GGUF_NAMES = {
    "transformer.wte.": "token_embd.",
    "transformer.wpe.": "position_embd.",
    "transformer.ln_f.": "output_norm.",
    "lm_head.": "output.",
    "transformer.h.": "blk.",
    ".ln_1.": ".attn_norm.",
    ".ln_2.": ".ffn_norm.",
    ".attn.c_attn.": ".attn_qkv.",
    ".attn.c_proj.": ".attn_output.",
    ".mlp.c_fc.": ".ffn_up.",
    ".mlp.c_proj.": ".ffn_down.",
}

Config, Model = GPT2Config, GPT2
