"""Layers with a sliding window in the engine: pages that they have passed serve others, and no token changes; against transformers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pjax import LLM, SamplingParams
from pjax.engine import LLMEngine
from tests.models import hf

WINDOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "all layers": ("Mistral", {"sliding_window": 9}),
    "some layers": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
}


def spoil(engine: LLMEngine) -> None:
    """Writes NaN to all pages that nobody owns or may find, but for the null page."""
    pool, layout = engine.scheduler.pool, engine.runner.config.layout
    free = np.zeros(pool.num_pages, bool)
    free[layout.num_reserved :] = (pool.owners() == 0) & ~pool.keyed()
    free[[page for page, _ in engine.scheduler.kv.swap._outs]] = False  # which the next step copies to host memory
    pages = np.array(engine.runner._pages)
    pages.reshape(layout.num_layers, pool.num_pages, *pages.shape[1:])[:, free] = np.nan
    engine.runner._pages = jax.device_put(pages, engine.runner._pool_format)


def run(llm: LLM, prompts: list[list[int]], num_new: int) -> list[Any]:
    """Outputs by prompt, of steps before each of which all free memory is spoiled."""
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, logprobs=0)
    names = [engine.add_request(prompt, params) for prompt in prompts]
    done = {}
    for number in itertools.count():
        spoil(engine)
        done |= {output.request_id: output for output in engine.step() if output.finished}
        if not engine.has_unfinished_requests:
            break
        if number % 20 == 10 and engine.scheduler.num_running:
            engine.scheduler.preempt(next(iter(engine.scheduler.running)))
        engine.scheduler.check()
    return [done[name].outputs[0] for name in names]


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("layers", ["unroll", "loop"])
@pytest.mark.parametrize("kind", WINDOWS)
def test_greedy_tokens_when_passed_pages_are_used_again(kind: str, layers: str, mode: str, tmp_path: Path) -> None:
    family, changes = WINDOWS[kind]
    model = hf.make(tmp_path, family, **changes)
    sizes: dict[str, Any] = {"num_pages": 41 if kind == "some layers" else 9, "async_scheduling": False, "layer_mode": layers}
    llm = hf.load(tmp_path, **sizes, max_num_seqs=3, preemption_mode=mode, swap_space=1 << 20)
    outputs = run(llm, hf.prompts(), 64)
    hf.check_greedy(model, outputs)
    assert llm.engine.stats().num_preemptions > 0 and llm.engine.scheduler.pool.num_used == 0
    prompt, hits = hf.prompts()[2], llm.engine.stats().prefix_cache_hits
    (first,) = run(llm, [prompt], 64)
    (again,) = run(llm, [prompt + first.token_ids], 5)
    (longer,) = run(llm, [prompt], 69)
    assert first.token_ids + again.token_ids == longer.token_ids, "a cached prefix gives the same tokens"
    assert llm.engine.stats().prefix_cache_hits > hits


def test_a_window_frees_what_a_long_answer_no_longer_sees(tmp_path: Path) -> None:
    """A request of 120 tokens has at most 6 pages of 4: those of 8 tokens before a chunk of 16."""
    hf.make(tmp_path, "Mistral", sliding_window=9)
    llm = hf.load(tmp_path, num_pages=8)
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    llm.engine.add_request(hf.prompts()[1], params)
    used = []
    while llm.engine.has_unfinished_requests:
        llm.engine.step()
        used.append(llm.engine.stats().num_used_pages)
    assert len(used) == 100 and max(used) <= 7 and llm.engine.stats().num_preemptions == 0
