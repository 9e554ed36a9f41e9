"""What goes between devices in a compiled program."""

from __future__ import annotations

import re

COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)(?:-start)?\("
)
SHAPE = re.compile(r"[a-z]+\d+\[([\d,]*)\]")


def collectives(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Kind and shape of each in the text of a compiled program."""
    found = []
    for shapes, kind in COLLECTIVE.findall(text):
        found += [(kind, tuple(map(int, filter(None, dims.split(","))))) for dims in SHAPE.findall(shapes)]
    return found
