"""Requests as the scheduler gets them."""

from __future__ import annotations

from typing import Any

from pjax.outputs import RequestMetrics
from pjax.params import SamplingParams
from pjax.scheduler import Request


def make_request(name: str, prompt: list[int], max_tokens: int, **fields: Any) -> Request:
    """A greedy request that no token ends; `fields` are others of `Request`."""
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        metrics=RequestMetrics(arrival_time=0.0),
        **{"params": SamplingParams(), "stop_token_ids": frozenset(), "eos_token_ids": frozenset(), "seed": 0} | fields,
    )
