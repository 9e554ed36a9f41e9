"""A step on its way from rank 0 to the other hosts: what they can't know by themselves, in a few kB.

Each host keeps the sequence table as far as plans have named it, and its devices the block tables. What has changed of those is
sent; of tokens those that the step computes; of a request's parameters and rules what its row holds, when it gets the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pjax.hosts.codec import Arrays, encode
from pjax.params import LogitRules
from pjax.scheduler.plan import StepPlan

Ints = npt.NDArray[np.int32]

STEP, COMPILE = "step", "compile"  # kinds of messages
_NONE = np.zeros(0, np.int32)
_PAIRS = np.zeros((0, 2), np.int32)


@dataclass(frozen=True, slots=True)
class NewRow:
    """What a row gets with the request that is new in it."""

    row: int
    floats: npt.NDArray[np.float32]  # of the sampling table
    ints: Ints
    rules: LogitRules | None
    known: Ints | None
    """Its tokens, where its sampling depends on them."""


class Mirror:
    """The sequence table as the plans so far have shown it: what the other hosts pack from."""

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        self.tokens: Ints = np.zeros((max_num_seqs, max_model_len), np.int32)

    def write(self, plan: StepPlan, tokens: Ints, new_rows: Sequence[NewRow]) -> bytes:
        """The message of a step. Arguments as for `ModelRunner.dispatch`."""
        rows, positions = spread(plan)
        arrays: dict[str, npt.NDArray[Any]] = {
            "rows": plan.rows,
            "starts": plan.starts,
            "counts": plan.counts[plan.num_decode :],
            "sample_rows": plan.sample_rows,
            "sample_sources": plan.sample_sources,
            "copies": plan.copies,
            "swap_outs": plan.swap_outs,
            "swap_ins": plan.swap_ins,
            "scored": np.array(plan.scored, np.int32),
            "blocks": plan.blocks,
            "tokens": tokens[rows, positions],
            # The token after the last one that is computed is scored, too.
            "next": np.array([tokens[plan.rows[index], end] for index, _, end in plan.scored], np.int32),
        }
        for index, new in enumerate(new_rows):
            arrays |= {f"floats{index}": new.floats, f"ints{index}": new.ints}
            if new.known is not None:
                arrays[f"known{index}"] = new.known
        rules = [None if new.rules is None else rules_as_json(new.rules) for new in new_rows]
        return encode(STEP, {"rows": [new.row for new in new_rows], "rules": rules} if new_rows else None, arrays)

    def read(self, head: dict[str, Any], arrays: Arrays) -> tuple[StepPlan, list[NewRow]]:
        """The plan of a message, without its requests, and the new rows; the table then holds what it computes."""
        rows = arrays["rows"]
        late = arrays.get("counts", _NONE)
        num_decode = len(rows) - len(late)
        plan = StepPlan(
            requests=[],
            rows=rows,
            starts=arrays["starts"],
            counts=np.concatenate([np.ones(num_decode, np.int32), late]),
            num_decode=num_decode,
            sampled=[],
            sample_rows=arrays.get("sample_rows", _NONE),
            sample_sources=arrays.get("sample_sources", _NONE),
            copies=arrays.get("copies", _PAIRS),
            swap_outs=arrays.get("swap_outs", _PAIRS),
            swap_ins=arrays.get("swap_ins", _PAIRS),
            blocks=arrays.get("blocks", _PAIRS),
            scored=[(int(index), int(start), int(end)) for index, start, end in arrays.get("scored", ())],
        )
        self.tokens[spread(plan)] = arrays["tokens"]
        for (index, _, end), token in zip(plan.scored, arrays.get("next", ()), strict=True):
            self.tokens[rows[index], end] = token
        new_rows = [
            NewRow(row, arrays[f"floats{index}"], arrays[f"ints{index}"], rules and rules_from_json(rules), arrays.get(f"known{index}"))
            for index, (row, rules) in enumerate(zip(head.get("rows", ()), head.get("rules", ()), strict=True))
        ]
        return plan, new_rows


def spread(plan: StepPlan) -> tuple[Ints, Ints]:
    """Row and position of every token that a plan computes, in its order."""
    rows = np.repeat(plan.rows, plan.counts)
    before = np.repeat(np.cumsum(plan.counts) - plan.counts, plan.counts)
    return rows, (np.repeat(plan.starts, plan.counts) + np.arange(len(rows)) - before).astype(np.int32)


def rules_as_json(rules: LogitRules) -> dict[str, Any]:
    """As `rules_from_json` reads it."""
    return {
        "allowed": None if rules.allowed is None else sorted(rules.allowed),
        "banned": sorted(rules.banned),
        "stops": sorted(rules.stops),
        "bias": rules.bias,
        "bad_sequences": rules.bad_sequences,
    }


def rules_from_json(found: dict[str, Any]) -> LogitRules:
    """The inverse of `rules_as_json`."""
    return LogitRules(
        allowed=None if found["allowed"] is None else frozenset(found["allowed"]),
        banned=frozenset(found["banned"]),
        stops=frozenset(found["stops"]),
        bias=tuple((token, value) for token, value in found["bias"]),
        bad_sequences=tuple(map(tuple, found["bad_sequences"])),
    )
