"""Penalties, rules, filters, logits processors and prompts' log-probabilities on a divided vocabulary as on a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax import LLM, SamplingParams
from tests.models import hf

VOCAB = 123  # no multiple of 2: the vocabulary is padded
KINDS: list[dict[str, Any]] = [
    {"repetition_penalty": 3, "presence_penalty": 2, "frequency_penalty": 2},
    {"allowed_token_ids": [0, 30, 31, 60, 61, 62, 63, 122], "bad_words_ids": [[a, b] for a in (30, 60, 122) for b in (31, 61, 122)]},
    {"logit_bias": dict.fromkeys(range(0, VOCAB, 3), 9.0), "temperature": 1, "typical_p": 0.6},
    {"min_tokens": 12, "stop_token_ids": list(range(50, 120))},
    {"logits_processors": ["last"]},
    {"prompt_logprobs": 3, "temperature": 1, "top_k": 20, "n": 2, "best_of": 3},
]


def last(logits: jax.Array, token_ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """The largest ids are likelier, and more so the longer the row is: sees the whole vocabulary."""
    return logits + jnp.arange(logits.shape[1]) * lengths[:, None] / logits.shape[1]


def outputs(folder: Path, size: int) -> list[Any]:
    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        lazy=True,
        progress=False,
        max_model_len=40,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        page_size=4,
        num_pages=14,
        tensor_parallel_size=size,
        logits_processors={"last": last},
    )
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, VOCAB, rng.integers(2, 24)).tolist() for _ in KINDS]
    params = [SamplingParams(**{"temperature": 0, "max_tokens": 14, "seed": 7, "ignore_eos": True} | kind) for kind in KINDS]
    return llm.generate(prompts, params, use_tqdm=False)


@pytest.mark.parametrize("size", [2, 8])
def test_the_same_tokens(tmp_path: Path, size: int) -> None:
    hf.make(tmp_path, "Llama", hidden_size=64, num_attention_heads=8, vocab_size=VOCAB, num_key_value_heads=2)
    expected, found = outputs(tmp_path, 1), outputs(tmp_path, size)
    assert sum(output.metrics.num_preemptions for output in found) > 0
    for one, other in zip(found, expected, strict=True):
        assert [each.token_ids for each in one.outputs] == [each.token_ids for each in other.outputs]
    for mine, theirs in zip(found[-1].prompt_logprobs[1:], expected[-1].prompt_logprobs[1:], strict=True):
        assert [(token, each.rank) for token, each in mine.items()] == [(token, each.rank) for token, each in theirs.items()]
        np.testing.assert_allclose([each.logprob for each in mine.values()], [each.logprob for each in theirs.values()], atol=1e-4)
