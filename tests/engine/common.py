"""What several tests of the engine use."""

from __future__ import annotations

from typing import Any

from pjax import LLM, SamplingParams
from tests.tiny import CONFIG

VOCAB = CONFIG["vocab_size"]
OPTIONS: dict[str, Any] = {
    "lazy": True,
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "num_pages": 16,
    "progress": False,
}
TIGHT = OPTIONS | {"num_pages": 9}
"""Pages for two of the longest sequences, or so."""
ROOMY = OPTIONS | {"max_num_seqs": 16, "num_pages": 200}
"""Rows and pages for all. (Engines of the same sizes share their compiled steps: take one of these three where you can.)"""


def greedy(max_tokens: int = 8, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **fields)


def ids(llm: LLM, prompt: Any, params: SamplingParams) -> list[int]:
    return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
