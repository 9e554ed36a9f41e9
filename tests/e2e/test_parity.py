"""Greedy tokens and log-probabilities of the demo model against transformers + torch, each prompt alone there.

transformers reads the GGUF file by itself, so readers and name tables are checked too. Its logits for prompt + output in
one forward pass say whether every token was the likeliest after those before it: by induction that is its greedy text.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pjax import LLM, BeamSearchParams, SamplingParams
from tests.e2e.common import CROWDED

ROOT = Path(__file__).resolve().parents[2]
NEAR_TIE = 1e-4  # of two logits: either token is right
LOGPROB_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def reference(demo_gguf: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def crowded(demo_gguf: Path) -> LLM:
    """Chunks of at most 32 tokens, and too few pages for the two longest requests."""
    return LLM(demo_gguf, **CROWDED)


def prompts_of(llm: LLM, count: int, longest: int) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens, the first of them next to some bound: English, code that stays as it is, and random ids."""
    rng = np.random.default_rng(7)
    text = llm.get_tokenizer().encode((ROOT / "LICENSE").read_text()[:9000] + (ROOT / "tests" / "e2e" / "code.txt").read_text())
    bounds = [1, 2, 15, 16, 17, longest, longest - 1, 31, 32, 33]
    lengths = [*bounds, *np.exp(rng.uniform(0, np.log(longest), count)).astype(int)][:count]
    starts = rng.integers(0, len(text) - longest, len(lengths))
    random = [rng.integers(0, 49152, n).tolist() for n in lengths]
    return [random[i] if i % 4 == 3 else text[starts[i] : starts[i] + n] for i, n in enumerate(lengths)]


def check_greedy(llm: LLM, reference: Any, prompts: list[list[int]], num_new: int) -> str:
    """Each token is the likeliest after those before it, or as good as that, and has transformers' log-probability; what was seen."""
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, logprobs=0)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0, "the pool was meant to be too small"
    near_ties, worst = 0, 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        assert len(tokens) == num_new
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + tokens[:-1]]), logits_to_keep=num_new).logits[0].double().numpy()
        chosen = logits[np.arange(num_new), tokens]
        behind = logits.max(axis=-1) - chosen
        assert behind.max() <= NEAR_TIE, f"a prompt of {len(prompt)}: token {int(behind.argmax())} is {behind.max():.2e} behind"
        near_ties += int((behind > 0).sum())
        expected = chosen - logits.max(-1) - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
        got = [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        worst = max(worst, float(np.abs(expected - got).max()))
        assert worst <= LOGPROB_TOLERANCE
        assert abs(output.outputs[0].cumulative_logprob - sum(got)) < 1e-6
    return f"{len(prompts)} prompts x {num_new} tokens, {near_ties} near-ties used, log-probabilities within {worst:.1e}"


def test_crowded_greedy_matches_transformers(crowded: LLM, reference, capsys: pytest.CaptureFixture[str]) -> None:
    seen = check_greedy(crowded, reference, prompts_of(crowded, 12, 250), 24)
    with capsys.disabled():
        print(f"\nparity: {seen}")


@pytest.mark.extended
@pytest.mark.timeout(900)
def test_a_larger_crowd_matches_transformers(demo_gguf: Path, reference, capsys: pytest.CaptureFixture[str]) -> None:
    """Pages for 4 of the 32 requests or so."""
    llm = LLM(demo_gguf, **CROWDED | {"max_model_len": 800, "max_num_seqs": 16, "max_num_batched_tokens": 48, "num_pages": 120})
    seen = check_greedy(llm, reference, prompts_of(llm, 32, 700), 64)
    with capsys.disabled():
        print(f"\nparity: {seen}")


@pytest.mark.extended
def test_generate_of_transformers_itself(crowded: LLM, reference) -> None:
    """Not only by induction."""

    for text in ("The capital of France is", "def fibonacci(n):"):
        ids = crowded.get_tokenizer().encode(text)
        with torch.inference_mode():
            expected = reference.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=24, min_new_tokens=24
            )[0, len(ids) :].tolist()
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        assert crowded.generate(text, params, use_tqdm=False)[0].outputs[0].token_ids == expected


def test_beam_search_of_transformers_itself(crowded: LLM, reference) -> None:

    text = "The three laws of robotics are"
    ids = crowded.get_tokenizer().encode(text)
    with torch.inference_mode():
        expected = reference.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=16, num_beams=4,
            num_return_sequences=4, length_penalty=0.8, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    params = BeamSearchParams(beam_width=4, max_tokens=16, length_penalty=0.8)
    sequences = crowded.beam_search(text, params)[0].sequences
    assert [sequence.tokens for sequence in sequences] == expected.sequences.tolist()
    np.testing.assert_allclose([sequence.score for sequence in sequences], expected.sequences_scores.numpy(), atol=1e-4)
    assert all(sequence.text.startswith(text) for sequence in sequences)
