"""OPT (Zhang et al. 2022): learned positions, ReLU, a tied head; its 350m norms after the residual and embeds narrowly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pjax.checkpoints.weights import Weight
from pjax.layers.attention import PagedContext
from pjax.layers.linear import ACTIVATIONS, MLP, Embedding, Linear, head_logits
from pjax.layers.norms import LayerNorm
from pjax.layers.stack import LayerStack
from pjax.models.hf_config import ConfigReader, MultiHeadConfig

PREFIX = "model."  # some published files do without
OTHER_NAMES: dict[str, str] = {}
POSITION_OFFSET = 2  # the first rows of the position table belong to padding
LAYER_NORM_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class OPTConfig(MultiHeadConfig):
    """What is its own."""

    embedding_size: int  # of a token's embedding; projected to D where it is another
    bias: bool
    affine: bool  # norms have weights
    norm_first: bool
    final_norm: bool

    @property
    def projected(self) -> bool:
        """Whether embeddings are projected to the model's width, and back for the head."""
        return self.embedding_size != self.hidden_size

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> OPTConfig:
        """From config.json's content. Raises CheckpointError for bad values, UnsupportedError for what is not applied."""
        config = ConfigReader(hf, "opt")
        hidden_size = config.integer("hidden_size")
        norm_first, no_final_norm = config.flag("do_layer_norm_before", True), config.flag("_remove_final_layer_norm")
        made = cls(
            vocab_size=config.integer("vocab_size"),
            hidden_size=hidden_size,
            embedding_size=config.integer("word_embed_proj_dim", hidden_size),
            intermediate_size=config.integer("ffn_dim"),
            num_layers=config.integer("num_hidden_layers"),
            num_heads=(num_heads := config.divisor("num_attention_heads", "hidden_size")),
            head_size=hidden_size // num_heads,
            max_position=config.integer("max_position_embeddings", 2048),
            activation=config.only("activation_function", ACTIVATIONS, "relu"),
            bias=config.flag("enable_bias", True),
            affine=config.flag("layer_norm_elementwise_affine", True),
            norm_first=norm_first,
            final_norm=norm_first and not no_final_norm,
            tied=config.flag("tie_word_embeddings", True),
        )
        config.finish()
        return made


class OPTAttention(nnx.Module):
    """Multi-head attention; one product makes queries, keys and values."""

    def __init__(self, config: OPTConfig, *, dtype: Any) -> None:
        self.config = config
        width = config.num_heads * config.head_size
        self.qkv = Linear(config.hidden_size, 3 * width, bias=config.bias, axes=((("heads", width),) * 3, "embed"), dtype=dtype)
        self.out = Linear(width, config.hidden_size, bias=config.bias, axes=("embed", "heads"), dtype=dtype)

    def __call__(self, x: jax.Array, pages: jax.Array, layer: int | jax.Array, context: PagedContext) -> tuple[jax.Array, jax.Array]:
        """x [T, D] to ([T, D], pages)."""
        heads = self.qkv(x).reshape(x.shape[0], 3, self.config.num_heads, self.config.head_size)
        out, pages = context.attend(pages, heads[:, 0], heads[:, 1], heads[:, 2], layer)
        return self.out(out.reshape(x.shape[0], -1)), pages


def _norm(config: OPTConfig, dtype: Any) -> LayerNorm:
    return LayerNorm(config.hidden_size, epsilon=LAYER_NORM_EPSILON, affine=config.affine, dtype=dtype)


class OPTBlock(nnx.Module):
    """Residual block with its norms before attention and MLP, or after them."""

    def __init__(self, config: OPTConfig, *, dtype: Any) -> None:
        self.norm_first = config.norm_first
        self.attention_norm = _norm(config, dtype)
        self.attention = OPTAttention(config, dtype=dtype)
        self.mlp_norm = _norm(config, dtype)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, activation=config.activation, bias=config.bias, dtype=dtype)

    def __call__(self, x: jax.Array, pages: jax.Array, layer: int | jax.Array, context: PagedContext) -> tuple[jax.Array, jax.Array]:
        """x [T, D] to ([T, D], pages)."""
        attended, pages = self.attention(self.attention_norm(x) if self.norm_first else x, pages, layer, context)
        x = x + attended
        if self.norm_first:
            return x + self.mlp(self.mlp_norm(x)), pages
        x = self.attention_norm(x)
        return self.mlp_norm(x + self.mlp(x)), pages


class OPT(nnx.Module):
    """Token ids to hidden states over the page pool, and hidden states to logits."""

    def __init__(self, config: OPTConfig, *, dtype: Any = jnp.float32, layer_mode: str = "unroll") -> None:
        self.config = config
        hidden, narrow = config.hidden_size, config.embedding_size
        self.embed = Embedding(config.vocab_size, narrow, axis="vocab", dtype=dtype)
        self.positions = Embedding(config.max_position + POSITION_OFFSET, hidden, dtype=dtype)
        self.project_in = Linear(narrow, hidden, dtype=dtype) if config.projected else None
        self.blocks = LayerStack(lambda: OPTBlock(config, dtype=dtype), config.num_layers, mode=layer_mode, rows_are_tokens=True)
        self.norm = _norm(config, dtype) if config.final_norm else None
        self.project_out = Linear(hidden, narrow, dtype=dtype) if config.projected else None
        self.head = None if config.tied else Linear(narrow, config.vocab_size, axes=("vocab", "embed"), dtype=dtype)

    def __call__(self, token_ids: jax.Array, pages: jax.Array, context: PagedContext) -> tuple[jax.Array, jax.Array]:
        """int32 [T] to hidden states [T, D] (before the last norm) and the pages with the tokens' K and V written."""

        x = self.embed(token_ids)
        if self.project_in is not None:
            x = self.project_in(x)
        return self.blocks(x + self.positions(context.positions + POSITION_OFFSET), pages, context)

    def logits(self, hidden: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        """[S, D] to float32 [S, V]."""
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        return head_logits(hidden, self.head, self.embed, num_rows)


def weight_table(config: OPTConfig) -> dict[str, Weight]:
    """Each parameter of `OPT` by its path, and the Hugging Face tensors that make it. `{}` is the layer."""
    hidden, wide, narrow, bias = config.hidden_size, config.intermediate_size, config.embedding_size, config.bias
    layer = "model.decoder.layers.{}."
    qkv = tuple((f"{layer}self_attn.{name}_proj", hidden) for name in "qkv")
    table = {
        "embed.table": Weight.plain("model.decoder.embed_tokens.weight", (config.vocab_size, narrow)),
        "positions.table": Weight.plain("model.decoder.embed_positions.weight", (config.max_position + POSITION_OFFSET, hidden)),
        "blocks.{}.attention.qkv": Weight.linear(hidden, *qkv, bias=bias),
        "blocks.{}.attention.out": Weight.linear(hidden, (layer + "self_attn.out_proj", hidden), bias=bias),
        "blocks.{}.mlp.up": Weight.linear(hidden, (layer + "fc1", wide), bias=bias),
        "blocks.{}.mlp.down": Weight.linear(wide, (layer + "fc2", hidden), bias=bias),
    }
    norms = {"blocks.{}.attention_norm": layer + "self_attn_layer_norm", "blocks.{}.mlp_norm": layer + "final_layer_norm"}
    if config.final_norm:
        norms["norm"] = "model.decoder.final_layer_norm"
    if config.affine:
        for path, name in norms.items():
            table[f"{path}.scale"] = Weight.plain(f"{name}.weight", (hidden,))
            table[f"{path}.bias"] = Weight.plain(f"{name}.bias", (hidden,))
    if config.projected:
        table["project_in"] = Weight.linear(narrow, ("model.decoder.project_in", hidden))
        table["project_out"] = Weight.linear(hidden, ("model.decoder.project_out", narrow))
    if not config.tied:
        table["head"] = Weight.linear(narrow, ("lm_head", config.vocab_size))
    return table


def known_leftovers(config: OPTConfig) -> tuple[str, ...]:
    """Regular expressions of tensors that checkpoints carry and the model does not read."""
    return (r"lm_head\.weight",) if config.tied else ()


Config, Model = OPTConfig, OPT
