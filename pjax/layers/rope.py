"""Rotary position embedding (Su et al. 2021) and its scalings for longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: `kind` is one of default, linear, dynamic, llama3, yarn. Names as in transformers."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # replaces YaRN's own
    attn_factor: float = 1.0  # multiplies YaRN's own, as in vLLM and llama.cpp
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    fraction: float = 1.0  # of a head that is rotated

    def scaled_length(self, max_position: int) -> int:
        """Tokens that a sequence may have, for a config with `max_position`: what vLLM derives.

        Linear and dynamic scaling multiply `max_position`, YaRN multiplies the original length. llama3's `max_position` is scaled already.
        """
        if self.kind in ("default", "llama3"):
            return max_position
        return int(self.factor * (self.original_max_position if self.kind == "yarn" else max_position))


def inverse_frequencies(config: RopeConfig, head_size: int) -> np.ndarray:
    """float32 [H / 2]: radians a token per rotated pair, after scaling."""
    theta = config.theta * (_dynamic_stretch(config.factor, head_size) if config.kind == "dynamic" else 1.0)
    base = 1.0 / theta ** (np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if config.kind == "linear":
        base = base / config.factor
    elif config.kind == "llama3":
        base = _llama3(base, config)
    elif config.kind == "yarn":
        base = _yarn(base, config, head_size)
    return base.astype(np.float32)


def _dynamic_stretch(factor: float, head_size: int) -> float:
    """What dynamic NTK multiplies the base by, for a sequence of `factor` times the original length.

    transformers takes the base that fits the current length. Keys in the cache are rotated already and shared between sequences of
    different lengths, so there is one base here for all, as in vLLM: the base of the longest sequence.
    """
    return (factor * factor - (factor - 1)) ** (head_size / (head_size - 2))


def _llama3(base: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Long waves are slowed by the factor, short ones kept, those between blended (Llama 3.1's model card)."""
    turns = config.original_max_position * base / (2 * math.pi)  # full turns over the original context
    blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * base / config.factor + blend * base


def _yarn(base: np.ndarray, config: RopeConfig, head_size: int) -> np.ndarray:
    """Peng et al. 2023, section 3.2: pairs that turn often extrapolate, those that turn seldom interpolate."""

    def pair_with_turns(turns: float) -> float:
        return head_size * math.log(config.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_with_turns(config.beta_fast), pair_with_turns(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    if low == high:
        high += 0.001  # as transformers does: avoids a division by zero
    interpolated = np.clip((np.arange(head_size // 2) - low) / (high - low), 0, 1)
    return base / config.factor * interpolated + base * (1 - interpolated)


def attention_factor(config: RopeConfig) -> float:
    """What cosines and sines are multiplied by; 1 except for YaRN (section 3.3)."""
    if config.kind != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor

    def temperature(scale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * scale * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return config.attn_factor * temperature(config.mscale) / temperature(config.mscale_all_dim)
    return config.attn_factor * temperature(1.0)


def rotation(config: RopeConfig, head_size: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [T, H / 2], for int32 positions [T]."""
    angles = positions.astype(jnp.float32)[:, None] * inverse_frequencies(config, head_size)
    factor = attention_factor(config)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [T, heads, H] rotated in float32; element i is paired with i + R / 2 (the "half" form of Hugging Face).

    cos and sin are [T, R / 2]; elements from R on stay as they are.
    """
    size = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if size == x.shape[-1] else jnp.concatenate([turned, x[..., size:]], axis=-1)
