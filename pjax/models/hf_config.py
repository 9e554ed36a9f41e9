"""Reading a Hugging Face config: what is used, what changes nothing, and the rest refused by name."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pjax.checkpoints.inert_keys import is_inert, sort_unknown
from pjax.errors import CheckpointError, UnsupportedError
from pjax.layers.rope import RopeConfig

log = logging.getLogger(__name__)

# Fields of rotary scaling that some kinds of it have. transformers and vLLM do not read those of another kind.
ROPE_KEYS = (
    "factor low_freq_factor high_freq_factor beta_fast beta_slow truncate attention_factor mscale mscale_all_dim "
    "original_max_position_embeddings"
).split()


class ConfigReader:
    """Takes keys from a config and remembers which; `finish` refuses what nobody took and could change the result."""

    def __init__(self, hf: Mapping[str, Any], family: str) -> None:
        self._hf = dict(hf)
        self._family = family
        self._taken: set[str] = set()
        self._numbers: dict[str, int] = {}  # integers that were read

    def get(self, key: str, default: Any = None) -> Any:
        """The key's value, or the default where the config has none or null."""
        self._taken.add(key)
        value = self._hf.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer that is at least `least`; CheckpointError otherwise or when it is missing."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise CheckpointError(f"{self._family} config: {key} is {value!r}, but must be an integer >= {least}")
        self._numbers[key] = value
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number; CheckpointError otherwise or when it is missing."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
            raise CheckpointError(f"{self._family} config: {key} is {value!r}, but must be a number > 0")
        return float(value)

    def divisor(self, key: str, of: str, default: int | None = None) -> int:
        """An integer >= 1 that divides the integer at another key, which was read; CheckpointError otherwise."""
        value, whole = self.integer(key, default), self._numbers[of]
        if whole % value:
            raise CheckpointError(f"{self._family} config: {key} is {value}, but must divide {of} {whole}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; CheckpointError otherwise."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self._family} config: {key} is {value!r}, but must be true or false")
        return value

    def only(self, key: str, supported: Iterable[Any], default: Any) -> Any:
        """A value out of a list; UnsupportedError with the list otherwise."""
        value, supported = self.get(key, default), list(supported)
        if value not in supported:
            raise UnsupportedError(f"{self._family} config: {key} is {value!r}; supported: {', '.join(map(repr, supported))}")
        return value

    def same(self, *keys: str) -> Any:
        """The value of keys of one meaning, None where none is there; CheckpointError when two differ."""
        given = {key: value for key in keys if (value := self.get(key)) is not None}
        values = list(given.values())
        if any(value != values[0] for value in values):
            pairs = " and ".join(f"{key} {value!r}" for key, value in given.items())
            raise CheckpointError(f"{self._family} config: {pairs} differ, but mean the same")
        return values[0] if values else None

    def finish(self) -> None:
        """Refuses what nobody read and could change the result; names in the log what is unknown beside it (`inert_keys`)."""
        self._settle(*sort_unknown(self._left))

    def finish_all(self, inert: Iterable[str]) -> None:
        """Refuses whatever nobody read, but for names that are inert here: those are named in the log."""
        others = [key for key in self._left if not is_inert(key)]
        self._settle([key for key in others if key not in inert], [key for key in others if key in inert])

    @property
    def _left(self) -> list[str]:
        return [key for key, value in self._hf.items() if key not in self._taken and value is not None]

    def _settle(self, refused: list[str], ignored: list[str]) -> None:
        if refused:
            raise UnsupportedError(f"{self._family} config has fields that pjax does not apply: {self._shown(refused)}")
        if ignored:
            log.info("%s config has fields that are ignored: %s", self._family, self._shown(ignored))

    def _shown(self, keys: list[str]) -> str:
        return ", ".join(f"{key}={self._hf[key]!r}" for key in sorted(keys))


@dataclass(frozen=True, kw_only=True)
class MultiHeadConfig:
    """What families without grouped queries have in common. Sizes are named as in docs/shapes.md."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    head_size: int  # H
    max_position: int
    activation: str
    tied: bool

    @property
    def num_kv_heads(self) -> int:
        """K: all of them."""
        return self.num_heads


def read_rope(config: ConfigReader, max_position: int, *, theta_key: str = "rope_theta", fraction_key: str | None = None) -> RopeConfig:
    """Reads rotary positions from `rope_theta` and `rope_scaling` (transformers 4), or `rope_parameters` (transformers 5).

    Where both are there, rope_scaling counts, as in transformers: somebody added a recipe to a config that transformers 5 had written.
    The base may stay in rope_parameters then.
    A family whose heads are rotated in part names the key of the part; for the others it must be 1. A family's own keys may stand
    beside the usual ones with the same values, as later versions of transformers 4 wrote them.
    """
    theta = config.same(theta_key, "rope_theta")
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    raw = scaling or parameters or {}
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"rope scaling is {raw!r}, but must be an object")
    inner = ConfigReader(raw, "rope scaling")
    inner_theta = inner.get("rope_theta")
    if inner_theta is None and theta is None and isinstance(parameters, Mapping):
        inner_theta = parameters.get("rope_theta")
    theta_reader = ConfigReader({"rope_theta": theta if inner_theta is None else inner_theta}, "rope")
    kind, old_kind = inner.get("rope_type"), inner.get("type")  # older files say "type"
    inner_kind = ConfigReader({"rope_type": kind or old_kind}, "rope scaling")
    kind = inner_kind.only("rope_type", ("default", "linear", "dynamic", "llama3", "yarn"), "default")
    values: dict[str, Any] = {"kind": kind, "theta": theta_reader.number("rope_theta", 10000.0)}
    if kind != "default":
        values["factor"] = inner.number("factor")
    original = inner.integer("original_max_position_embeddings", max_position)
    values["original_max_position"] = max_position if kind == "dynamic" else original  # dynamic: as in transformers and vLLM
    if kind == "llama3":
        values["low_freq_factor"] = inner.number("low_freq_factor")
        values["high_freq_factor"] = inner.number("high_freq_factor")
    if kind == "yarn":
        values["beta_fast"] = inner.number("beta_fast", 32.0)
        values["beta_slow"] = inner.number("beta_slow", 1.0)
        values["attn_factor"] = inner.number("attn_factor", 1.0)
        values["truncate"] = inner.flag("truncate", True)
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            values[key] = None if inner.get(key) is None else inner.number(key)
    fraction = None if fraction_key is None else config.same(fraction_key, "partial_rotary_factor")
    if fraction_key is None:
        inner.only("partial_rotary_factor", (1, 1.0), 1.0)
    else:
        values["fraction"] = inner.number("partial_rotary_factor", 0.25 if fraction is None else fraction)
        if values["fraction"] > 1:
            raise CheckpointError(f"rope scaling: {fraction_key} is {values['fraction']}, but must be in (0, 1]")
    if kind != "yarn":
        inner.only("attn_factor", (1, 1.0), 1.0)
    inner.only("extrapolation_factor", (1, 1.0), 1.0)
    inner.finish_all(ROPE_KEYS)
    return RopeConfig(**values)
