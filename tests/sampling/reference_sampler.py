"""The sampler in float64 numpy, one row after the other, from the definitions. Knows nothing of the device's code."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Floats = np.ndarray


@dataclass
class Row:
    """One row: what it is asked for, and the tokens that it has."""

    prompt: list[int]
    output: list[int]
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    allowed: list[int] | None = None
    bias: dict[int, float] = field(default_factory=dict)
    bad: list[list[int]] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    min_tokens: int = 0


def adjusted(logits: Floats, row: Row) -> Floats:
    """Logits [V] after allowed tokens, biases, min_tokens, bad words and penalties."""
    out = logits.astype(np.float64)
    if row.allowed is not None:
        out[[token for token in range(len(out)) if token not in row.allowed]] = -np.inf
    for words in row.bad:
        if len(words) == 1:
            out[words[0]] = -np.inf
    for token, value in row.bias.items():
        out[token] += value
    if len(row.output) < row.min_tokens:
        out[row.stops] = -np.inf
    masked = out.copy()
    for *before, last in row.bad:
        if before and row.output[-len(before) :] == before:
            masked[last] = -np.inf
    out = masked if np.isfinite(masked).any() else out
    for token in set(row.prompt + row.output):
        out[token] = out[token] / row.repetition if out[token] > 0 else out[token] * row.repetition
    for token in set(row.output):
        out[token] -= row.frequency * row.output.count(token) + row.presence
    return out


def typical(logits: Floats, p: float) -> set[int]:
    """Tokens that are kept, by sorting (Meister et al. 2023); those as typical as the last one stay too."""
    finite = logits > -np.inf
    weights = np.where(finite, np.exp(logits - logits[finite].max()), 0)
    weights /= weights.sum()
    surprise = -np.log(weights[finite])
    distance = np.full(len(logits), np.inf)
    distance[finite] = np.abs(surprise - (weights[finite] * surprise).sum())
    total, kept = 0.0, set()
    for token in np.argsort(distance, kind="stable"):
        kept.add(int(token))
        total += weights[token]
        if total >= p:
            break
    return kept | {int(token) for token in np.flatnonzero(distance <= max(distance[list(kept)]))}
