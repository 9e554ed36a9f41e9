"""The demo model end to end: the pool small enough to preempt, the budget small enough to chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pjax import LLM, SamplingParams
from tests.e2e.common import CROWDED

SIZES: dict[str, Any] = {"lazy": True, "max_model_len": 128, "max_num_seqs": 4, "progress": False}


@pytest.mark.extended
def test_crowding_chunking_and_preemption_do_not_change_greedy_tokens(demo_gguf: Path) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 49152, n).tolist() for n in (1, 5, 40, 70)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    llm = LLM(demo_gguf, **SIZES, max_num_batched_tokens=32, num_pages=9)
    alone = [llm.generate([p], params, use_tqdm=False)[0] for p in prompts]
    together = llm.generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
    assert all(len(o.outputs[0].token_ids) == 12 for o in together)
    llm.engine.scheduler.check()
    assert llm.engine.scheduler.pool.num_used == 0


def test_continues_with_paris(demo_gguf: Path) -> None:
    llm = LLM(demo_gguf, **CROWDED)
    out = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert out[0].outputs[0].text.startswith(" Paris.")


@pytest.mark.extended
def test_seeded_draws_do_not_depend_on_company_chunks_or_preemption(demo_gguf: Path) -> None:
    prompts = ["Tell me about gravity", "Once upon a time", "def main():", "The sea"]
    params = [SamplingParams(max_tokens=40, seed=i, ignore_eos=True) for i in range(4)]
    roomy = LLM(demo_gguf, **SIZES, max_num_batched_tokens=32, num_pages=64)
    alone = [roomy.generate(p, one, use_tqdm=False)[0].outputs[0].token_ids for p, one in zip(prompts, params)]
    tight = LLM(demo_gguf, **SIZES, max_num_batched_tokens=16, num_pages=14, page_size=8)
    together = tight.generate(prompts, params, use_tqdm=False)
    assert sum(output.metrics.num_preemptions for output in together) > 0
    assert [output.outputs[0].token_ids for output in together] == alone
