"""Cached prefixes and samples of one prompt, in the engine: same tokens as without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pjax import LLM, InvalidRequestError, SamplingParams
from tests.engine.common import OPTIONS, ROOMY, TIGHT, VOCAB, greedy


def test_a_cached_prefix_changes_no_token(folder: Path) -> None:
    rng = np.random.default_rng(1)
    shared = rng.integers(0, VOCAB, 40).tolist()
    prompts = [shared + rng.integers(0, VOCAB, n).tolist() for n in (0, 1, 8, 9, 20)] + [shared[:32], shared[:33]]
    plain = LLM(folder, **OPTIONS, enable_prefix_caching=False).generate(prompts, greedy(), use_tqdm=False)
    llm = LLM(folder, **OPTIONS)
    for cached in ([0, 32, 32, 32, 32, 16, 32], [32, 32, 48, 48, 48, 16, 32]):
        outputs = llm.generate(prompts, greedy(), use_tqdm=False)
        assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in plain]
        assert all(o.num_cached_tokens <= most for o, most in zip(outputs, cached, strict=True))
        llm.engine.scheduler.check()
    assert sum(o.num_cached_tokens for o in outputs) > 0
    assert all(o.num_cached_tokens == 0 for o in plain)


def test_cache_salts_as_vllm_gives_them(folder: Path) -> None:
    llm = LLM(folder, **OPTIONS)
    prompt = list(range(33))

    def cached(salt: str | None) -> int:
        given = {"prompt_token_ids": prompt} | ({} if salt is None else {"cache_salt": salt})
        return llm.generate(given, greedy(1), use_tqdm=False)[0].num_cached_tokens

    assert [cached(salt) for salt in ("a", "b", None, "a", None)] == [0, 0, 0, 32, 32]
    for bad in ("", 5):
        with pytest.raises(InvalidRequestError, match=f"cache_salt is {bad!r}, but must be a non-empty string"):
            llm.generate({"prompt": "x", "cache_salt": bad}, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match=r"prompt has keys \['cache_salt'\]"):
        llm.generate({"cache_salt": "a"}, use_tqdm=False)


def test_n_samples_are_what_n_requests_would_draw(folder: Path) -> None:
    """Prompts that end within a page, at its end, and in one token; seeds, stops and log-probabilities of each sample."""
    llm = LLM(folder, **OPTIONS)
    for prompt in ([5] * 20, list(range(32)), [7]):
        params = {"max_tokens": 20, "logprobs": 2, "ignore_eos": True, "stop_token_ids": list(range(0, 250, 25))}
        output = llm.generate([prompt], SamplingParams(n=4, seed=40, **params), use_tqdm=False)[0]
        assert [one.index for one in output.outputs] == [0, 1, 2, 3] and output.finished
        for index, one in enumerate(output.outputs):
            alone = llm.generate([prompt], SamplingParams(seed=40 + index, **params), use_tqdm=False)[0].outputs[0]
            assert (one.token_ids, one.text, one.finish_reason, one.stop_reason) == (
                alone.token_ids, alone.text, alone.finish_reason, alone.stop_reason
            )  # fmt: skip
            assert one.cumulative_logprob == pytest.approx(alone.cumulative_logprob, abs=1e-4)
        assert len({tuple(one.token_ids) for one in output.outputs}) == 4
    assert llm.engine.scheduler.pool.num_used == 0


def test_more_samples_than_rows_and_pages(folder: Path) -> None:
    llm = LLM(folder, **TIGHT)
    params = SamplingParams(n=7, seed=3, max_tokens=40, ignore_eos=True)
    outputs = llm.generate([[5] * 20, [9] * 30], params, use_tqdm=False)
    roomy = LLM(folder, **ROOMY).generate([[5] * 20, [9] * 30], params, use_tqdm=False)
    assert [[one.token_ids for one in o.outputs] for o in outputs] == [[one.token_ids for one in o.outputs] for o in roomy]
    assert sum(o.metrics.num_preemptions for o in outputs) > 0 and sum(o.metrics.num_preemptions for o in roomy) == 0


def test_samples_stream_and_are_aborted_together(llm: LLM) -> None:
    engine = llm.engine
    name = engine.add_request("hello", SamplingParams(n=3, seed=1, max_tokens=9, ignore_eos=True))
    engine.step()
    (output,) = engine.step()
    assert [len(one.token_ids) for one in output.outputs] == [2, 2, 2] and not output.finished
    assert output.metrics.finished_time is None
    assert engine.abort_request(name) and not engine.has_unfinished_requests
    assert engine.scheduler.pool.num_used == 0
