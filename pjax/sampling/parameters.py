"""Sampling parameters by row: a table on the host, two matrices on the way, an array for each in the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from pjax.params import LogitRules, SamplingParams

Ints = npt.NDArray[np.int32]

# Column -> its value in padding rows, which are greedy.
FLOATS = {
    "temperature": 0.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logprob_temperature": 1.0,
}
INTS = {"top_k": 0, "num_logprobs": -1, "seed_high": 0, "seed_low": 0, "rows": 0, "prompt_lens": 0, "min_lens": 0, "flags": 0}

HAS_ALLOWED = 1  # flags: this row's allowed tokens are read
HAS_BIAS = 2
HAS_BAD_SEQUENCES = 4
FIRST_PROCESSOR = 3  # the bit of the first logits processor
MAX_PROCESSORS = 24

COLDEST, HOTTEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
"""Bounds of temperatures on the device, where a smaller one would be 0 and a larger one infinite; 0 itself is greedy."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
    """Per row; padding rows are greedy."""

    temperature: jax.Array  # float32 [S]; 0 is greedy
    top_k: jax.Array  # int32 [S]; 0 is off
    top_p: jax.Array  # float32 [S]; 1 is off
    min_p: jax.Array  # float32 [S]; 0 is off
    typical_p: jax.Array  # float32 [S]; 1 is off
    repetition_penalty: jax.Array  # float32 [S]; 1 is off
    presence_penalty: jax.Array  # float32 [S]; 0 is off
    frequency_penalty: jax.Array  # float32 [S]; 0 is off
    seed: jax.Array  # uint32 [S, 2]
    num_logprobs: jax.Array  # int32 [S]; -1: none wanted
    logprob_temperature: jax.Array  # float32 [S]; of the reported log-probabilities: 1 but for beams
    rows: jax.Array  # int32 [S], of the token table and the rule tables
    prompt_lens: jax.Array  # int32 [S]
    min_lens: jax.Array  # int32 [S]; no token at a position before it may end the sequence; 0 is off
    flags: jax.Array  # int32 [S]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedSampling:
    """What crosses to the device: two arrays cost less than fifteen."""

    floats: jax.Array  # float32 [S, len(FLOATS)]
    ints: jax.Array  # int32 [S, len(INTS)]

    def unpack(self) -> SamplingArrays:
        """The columns."""
        columns: dict[str, Any] = {name: self.floats[:, index] for index, name in enumerate(FLOATS)}
        columns |= {name: self.ints[:, index] for index, name in enumerate(INTS)}
        seed = jnp.stack([columns.pop("seed_high"), columns.pop("seed_low")], axis=1)
        return SamplingArrays(**columns, seed=lax.bitcast_convert_type(seed, jnp.uint32))


def sampling_struct(num_rows: int) -> PackedSampling:
    """Shapes and types."""
    struct: Any = jax.ShapeDtypeStruct
    return PackedSampling(struct((num_rows, len(FLOATS)), jnp.float32), struct((num_rows, len(INTS)), jnp.int32))


class SamplingTable:
    """Sampling parameters by table row, written when a request gets a row and gathered at every step."""

    def __init__(self, num_rows: int) -> None:
        self._owners: list[tuple[object, int] | None] = [None] * num_rows
        self.floats: npt.NDArray[np.float32] = np.tile(np.array(list(FLOATS.values()), np.float32), (num_rows, 1))
        self.ints: Ints = np.tile(np.array(list(INTS.values()), np.int32), (num_rows, 1))

    def set(
        self,
        row: int,
        owner: object,
        params: SamplingParams,
        seed: int,
        logprob_temperature: float = 1.0,
        *,
        num_preemptions: int = 0,
        prompt_len: int = 0,
        flags: int = 0,
        has_stops: bool = True,
    ) -> bool:
        """Writes a row, unless it holds this owner's parameters already; whether it did.

        Args:
          num_preemptions: of the owner so far. One that was preempted since its row was written may have come back to the same row
            after another owner, or after a step that failed: the row is written again.
          has_stops: whether tokens of the row's own are forbidden before `min_tokens`. Without any, the row's table of them is not
            written, and may hold those of the request that had the row before.
        """
        if (known := self._owners[row]) is not None and known[0] is owner and known[1] == num_preemptions:
            return False
        self._owners[row] = owner, num_preemptions
        floats: dict[str, float] = {name: getattr(params, name) for name in FLOATS if name != "logprob_temperature"}
        floats |= {"logprob_temperature": logprob_temperature}
        for name in ("temperature", "logprob_temperature"):
            floats[name] = min(max(floats[name], COLDEST), HOTTEST) if floats[name] else 0.0
        self.floats[row] = list(floats.values())
        high, low = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32).view(np.int32)
        ints = {
            "top_k": min(max(params.top_k, 0), 2**31 - 1),
            "num_logprobs": (params.logprobs or 0) if params.needs_logprobs else -1,
            "seed_high": high,
            "seed_low": low,
            "rows": row,
            "prompt_lens": prompt_len,
            "min_lens": min(prompt_len + params.min_tokens, 2**31 - 1) if params.min_tokens and has_stops else 0,
            "flags": flags,
        }
        self.ints[row] = [ints[name] for name in INTS]
        return True

    def gather(self, rows: Ints, size: int) -> PackedSampling:
        """The rows' parameters, padded to `size` with greedy rows."""
        floats = np.empty((size, len(FLOATS)), np.float32)
        ints = np.empty((size, len(INTS)), np.int32)
        count = len(rows)
        floats[:count], ints[:count] = self.floats[rows], self.ints[rows]
        floats[count:], ints[count:] = list(FLOATS.values()), list(INTS.values())
        return PackedSampling(floats, ints)  # type: ignore[arg-type]  # numpy in, device arrays inside the step


def flags_of(rules: LogitRules | None, processors: list[int]) -> int:
    """The flags of a row with these rules, and logits processors by their numbers."""
    flags = sum(1 << (FIRST_PROCESSOR + index) for index in processors)
    if rules is not None:
        flags |= HAS_ALLOWED * (rules.allowed is not None or bool(rules.banned))
        flags |= HAS_BIAS * bool(rules.bias) | HAS_BAD_SEQUENCES * bool(rules.bad_sequences)
    return flags
