"""A family from outside pjax: one attention layer a block, no MLP, no norm, no positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pjax.checkpoints.weights import Weight
from pjax.layers.linear import Embedding, Linear, head_logits
from pjax.layers.stack import LayerStack
from pjax.models.hf_config import ConfigReader

PREFIX = "toy."
OTHER_NAMES: dict[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_size: int
    max_position: int = 64

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ToyConfig:
        config = ConfigReader(hf, "toy")
        made = cls(
            vocab_size=config.integer("vocab_size"),
            num_layers=config.integer("layers"),
            num_kv_heads=config.integer("heads"),
            head_size=config.integer("head_size"),
        )
        config.finish()
        return made


class ToyBlock(nnx.Module):
    def __init__(self, config: ToyConfig, *, dtype: Any) -> None:
        self.config = config
        width = config.num_kv_heads * config.head_size
        self.qkv = Linear(width, 3 * width, dtype=dtype)

    def __call__(self, x: jax.Array, pages: jax.Array, layer: Any, context: Any) -> tuple[jax.Array, jax.Array]:
        heads = self.qkv(x).reshape(x.shape[0], 3, self.config.num_kv_heads, self.config.head_size)
        out, pages = context.attend(pages, heads[:, 0], heads[:, 1], heads[:, 2], layer)
        return x + out.reshape(x.shape), pages


class Toy(nnx.Module):
    def __init__(self, config: ToyConfig, *, dtype: Any = jnp.float32, layer_mode: str = "unroll") -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.num_kv_heads * config.head_size, dtype=dtype)
        self.blocks = LayerStack(lambda: ToyBlock(config, dtype=dtype), config.num_layers, mode=layer_mode)

    def __call__(self, token_ids: jax.Array, pages: jax.Array, context: Any) -> tuple[jax.Array, jax.Array]:
        return self.blocks(self.embed(token_ids), pages, context)

    def logits(self, hidden: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        return head_logits(hidden, None, self.embed, num_rows)


def weight_table(config: ToyConfig) -> dict[str, Weight]:
    width = config.num_kv_heads * config.head_size
    return {
        "embed.table": Weight.plain("toy.embed", (config.vocab_size, width)),
        "blocks.{}.qkv": Weight.linear(width, ("toy.{}.qkv", 3 * width)),
    }


def known_leftovers(config: ToyConfig) -> tuple[str, ...]:
    return ()


Config, Model = ToyConfig, Toy
