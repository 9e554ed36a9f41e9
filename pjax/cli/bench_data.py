"""Requests to measure with, and how figures are summed up."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pjax.errors import ConfigError


def random_requests(args: argparse.Namespace, count: int, vocab_size: int) -> list[tuple[list[int], int]]:
    """Random token ids, and how many tokens to generate for each."""
    import numpy as np

    rng = np.random.default_rng(args.bench_seed)
    ratio = getattr(args, "range_ratio", 0.0)

    def lengths(mean: int) -> list[int]:
        low, high = max(int(mean * (1 - ratio)), 1), max(int(mean * (1 + ratio)), 1)
        return rng.integers(low, high + 1, count).tolist()

    return [(rng.integers(0, vocab_size, a).tolist(), b) for a, b in zip(lengths(args.input_len), lengths(args.output_len), strict=True)]


def read_dataset(path: Path, output_len: int) -> list[tuple[Any, int]]:
    """Prompts of a file, and how many tokens to generate for each. ConfigError with the line that is not as it must be."""
    found = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):  # noqa: B007
            if line.strip():
                record = json.loads(line)
                found.append((record["prompt"], int(record.get("max_tokens") or output_len)))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset {path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'--dataset {path}:{number}: must be {{"prompt": …, "max_tokens": …}} ({error!r})') from None
    if not found:
        raise ConfigError(f"--dataset {path} holds no prompt")
    return found


def rates(num_requests: int, num_in: int, num_out: int, seconds: float) -> dict[str, Any]:
    """Requests and tokens, and how many of them a second."""
    return {
        "seconds": seconds,
        "requests_per_s": num_requests / seconds,
        "input_tokens": num_in,
        "output_tokens": num_out,
        "output_tokens_per_s": num_out / seconds,
        "total_tokens_per_s": (num_in + num_out) / seconds,
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles; empty without values."""
    import numpy as np

    if not len(values):
        return {}
    points = {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
    return {"mean": float(np.mean(values)), **points, "max": float(np.max(values))}
