"""Greedy tokens beside prefix hits, forks, beams, chunks and preemption, all in one crowded engine that has been warmed up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pjax import LLM, BeamSearchParams, SamplingParams
from tests.engine.common import OPTIONS, TIGHT, VOCAB
from tests.tiny import write_model


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["swap", pytest.param("recompute", marks=pytest.mark.extended)])
def test_greedy_tokens_do_not_change_and_nothing_compiles(tmp_path: Path, mode: str) -> None:
    folder = write_model(tmp_path)
    rng = np.random.default_rng(11)
    shared = rng.integers(0, VOCAB, 40).tolist()
    prompts = [shared[: rng.integers(1, 41)] + rng.integers(0, VOCAB, rng.integers(1, 20)).tolist() for _ in range(24)]
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    alone = LLM(folder, **OPTIONS, enable_prefix_caching=False)
    expected = [alone.generate([prompt], greedy, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]
    beams = BeamSearchParams(beam_width=3, max_tokens=10)
    expected_beams = [output.sequences for output in alone.beam_search(prompts[:6], beams)]

    llm = LLM(folder, **TIGHT | {"lazy": False, "warmup": "all"}, preemption_mode=mode)
    engine, warm = llm.engine, llm.engine.runner.num_compilations
    names: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        names[engine.add_request(prompt, greedy)] = index
        engine.add_request(
            prompt, SamplingParams(n=3, max_tokens=20, seed=index, ignore_eos=True), f"samples {index}", priority=index % 3 - 1
        )
        if index < 6:
            engine.add_request(prompt, beams, f"beams {index}")
        if index % 5 == 0:
            engine.step()
            engine.abort_request(f"samples {index - 1}")
    copies = preemptions = cached = 0
    done: dict[str, Any] = {}
    take_copies = engine.scheduler.kv.take_copies

    def counted() -> Any:
        nonlocal copies
        taken = take_copies()
        copies += len(taken)
        return taken

    engine.scheduler.kv.take_copies = counted  # type: ignore[method-assign]
    while engine.has_unfinished_requests:
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
                preemptions += output.metrics.num_preemptions
                cached += output.num_cached_tokens
        engine.scheduler.check()
    for name, index in names.items():
        assert done[name].outputs[0].token_ids == expected[index]
    for index, sequences in enumerate(expected_beams):
        assert [prompts[index] + one.token_ids for one in done[f"beams {index}"].outputs] == [one.tokens for one in sequences]
    assert copies > 20 and preemptions > 0 and cached > 200, (copies, preemptions, cached)
    swap = engine.scheduler.kv.swap
    assert (swap.num_restored_pages > 10) == (mode == "swap"), swap.num_restored_pages
    assert swap.pool is None or swap.pool.num_used == 0
    assert engine.runner.num_compilations == warm
    assert engine.scheduler.pool.num_used == 0
