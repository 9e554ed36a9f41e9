"""Beam search against transformers on tiny random models: the same sequences, the same scores; crowded, preempted, refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pjax import LLM, BeamSearchParams, InvalidRequestError, SamplingParams
from tests.engine.common import ROOMY
from tests.tiny import CONFIG

VOCAB = CONFIG["vocab_size"]
EOS = [257, 7, 30, 90]  # likely enough to end some beams
OPTIONS = ROOMY
PROMPTS = [[1, 2, 3], [5] * 16, list(range(20, 55))]


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def found_by_transformers(model: Any, prompt: list[int], params: BeamSearchParams, eos: list[int]) -> list[tuple[list[int], float]]:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            num_beams=params.beam_width,
            num_return_sequences=params.beam_width,
            max_new_tokens=params.max_tokens,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            eos_token_id=eos or None,
            pad_token_id=VOCAB - 1,
            return_dict_in_generate=True,
            output_scores=True,
        )
    found = []
    for sequence, score in zip(output.sequences.tolist(), output.sequences_scores.tolist(), strict=True):
        new = sequence[len(prompt) :]
        ends = [index for index, token in enumerate(new) if token in eos]
        length = ends[0] + 1 if ends else next((i for i, _ in enumerate(new) if set(new[i:]) == {VOCAB - 1}), len(new))
        found.append((prompt + new[:length], score))
    return found


def check(llm: LLM, reference: Any, params: BeamSearchParams, eos: list[int], prompts: list[list[int]] = PROMPTS) -> list[str]:
    kept, llm.engine._intake.eos_token_ids = llm.engine._intake.eos_token_ids, frozenset(eos)
    try:
        outputs = llm.beam_search(prompts, params)
    finally:
        llm.engine._intake.eos_token_ids = kept
    reasons = []
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = found_by_transformers(reference, prompt, params, [] if params.ignore_eos else eos)
        assert [s.tokens for s in output.sequences] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose([s.score for s in output.sequences], [score for _, score in expected], rtol=2e-5, atol=2e-5)
        for sequence in output.sequences:
            num_new = len(sequence.tokens) - len(prompt)
            assert sequence.score == pytest.approx(sequence.cum_logprob / num_new**params.length_penalty)
            assert sequence.text == llm.get_tokenizer().decode(sequence.tokens)
            ends = not params.ignore_eos and sequence.tokens[-1] in eos
            assert sequence.finish_reason == ("stop" if ends else "length")
            reasons.append(sequence.finish_reason)
    llm.engine.scheduler.check()
    assert llm.engine.scheduler.pool.num_used == 0
    return reasons


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_as_transformers(llm: LLM, reference: Any, width: int, early_stopping: bool | str) -> None:
    if width == 1:
        # transformers' generate() takes num_beams=1 for greedy search, which has no scores.
        params = BeamSearchParams(beam_width=1, max_tokens=12, early_stopping=early_stopping, ignore_eos=True)
        greedy = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
        outputs = llm.beam_search(PROMPTS, params)
        assert [o.sequences[0].tokens for o in outputs] == [p + o.outputs[0].token_ids for p, o in zip(PROMPTS, greedy)]
        return
    params = BeamSearchParams(beam_width=width, max_tokens=12, early_stopping=early_stopping)
    check(llm, reference, params, EOS[:3])


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.6, 2.0])
@pytest.mark.parametrize("early_stopping", [False, "never"])
def test_length_penalties(llm: LLM, reference: Any, penalty: float, early_stopping: bool | str) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=14, length_penalty=penalty, early_stopping=early_stopping)
    check(llm, reference, params, EOS)


def test_sequences_that_end_early_and_late(llm: LLM, reference: Any) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=10, length_penalty=1.0)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, n).tolist() for n in (1, 2, 15, 16, 17, 31, 33, 50)]
    reasons = check(llm, reference, params, [257, *range(0, 60, 2)][:7], prompts)
    assert {"stop", "length"} <= set(reasons), "both ends were meant to occur"


def test_without_an_end_and_with_many(llm: LLM, reference: Any) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=9, ignore_eos=True)
    assert set(check(llm, reference, params, EOS)) == {"length"}
    check(llm, reference, BeamSearchParams(beam_width=3, max_tokens=1), EOS)
    check(llm, reference, BeamSearchParams(beam_width=2, max_tokens=9), [])


def test_a_crowd_in_few_pages_changes_nothing(folder: Path, reference: Any) -> None:
    """Beams beside sampled requests; pages for two sequences or so: beams that wait give theirs away."""
    tight = LLM(folder, **OPTIONS | {"num_pages": 4, "max_num_seqs": 5, "max_num_batched_tokens": 16})
    engine = tight.engine
    params = BeamSearchParams(beam_width=4, max_tokens=12)
    names = [engine.add_request(prompt, params) for prompt in PROMPTS]
    plain = [engine.add_request([9, 9, i], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)) for i in range(4)]
    samples = engine.add_request([5] * 16, SamplingParams(n=3, seed=1, max_tokens=20, ignore_eos=True))
    done: dict[str, Any] = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        engine.scheduler.check()
    assert sum(done[name].metrics.num_preemptions for name in names) > 0
    for name, prompt in zip(names, PROMPTS, strict=True):
        expected = found_by_transformers(reference, prompt, params, [257])
        assert [prompt + one.token_ids for one in done[name].outputs] == [tokens for tokens, _ in expected]
    roomy = LLM(folder, **OPTIONS)
    for i, name in enumerate(plain):
        alone = roomy.generate([[9, 9, i]], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), use_tqdm=False)[0]
        assert done[name].outputs[0].token_ids == alone.outputs[0].token_ids
    assert len(done[samples].outputs) == 3
    assert engine.scheduler.pool.num_used == 0


@pytest.mark.parametrize("penalty", [1e308, -1e308])
def test_a_length_penalty_beyond_all_bounds_harms_nobody(llm: LLM, penalty: float) -> None:
    """Scores are then 0 or infinite, as torch's are; whoever runs beside it gets the same tokens."""
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    alone = llm.generate(PROMPTS, params, use_tqdm=False)
    engine = llm.engine
    names = [engine.add_request(prompt, params) for prompt in PROMPTS]
    params_of_beams = BeamSearchParams(beam_width=3, max_tokens=6, length_penalty=penalty)
    beams = engine.add_request(PROMPTS[0], params_of_beams)
    done: dict[str, Any] = {}
    while engine.has_unfinished_requests:
        done |= {output.request_id: output for output in engine.step() if output.finished}
    assert [done[name].outputs[0].token_ids for name in names] == [output.outputs[0].token_ids for output in alone]
    assert len(done[beams].outputs) == 3 and all(1 <= len(one.token_ids) <= 6 for one in done[beams].outputs)
    (searched,) = llm.beam_search(PROMPTS[:1], params_of_beams)
    assert {one.score for one in searched.sequences if one.tokens[len(PROMPTS[0]) :][1:]} <= {-0.0, -float("inf")}


def test_the_prompt_is_computed_once_and_pages_are_shared(llm: LLM) -> None:
    engine = llm.engine
    request_id = engine.add_request(list(range(40, 80)), BeamSearchParams(beam_width=8, max_tokens=10, ignore_eos=True))
    most = tokens = 0
    while engine.has_unfinished_requests:
        plan = engine.scheduler.schedule()
        tokens += plan.num_tokens
        most = max(most, engine.scheduler.pool.num_used)
        result = engine.runner.fetch(engine.runner.dispatch(plan, engine.scheduler.table.tokens))
        engine.scheduler.commit(plan, result.tokens, 0.0, (result.top_tokens, result.top_logprobs))
        engine.scheduler.check()
    engine.abort_request(request_id)
    assert tokens == 40 + 8 * 9
    assert most <= 2 + 8 * 2, "two full pages of the prompt are shared, the rest is each beam's own"


def test_temperature_divides_the_logits(llm: LLM) -> None:
    hot, cold, plain = (
        llm.beam_search([PROMPTS[0]], BeamSearchParams(beam_width=2, max_tokens=1, temperature=t, ignore_eos=True))[0]
        for t in (2.0, 0.0, 1.0)
    )
    assert cold == plain
    logprobs = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=1, logprobs=20), use_tqdm=False)[0].outputs[0].logprobs[0]
    a, b = sorted((entry.logprob for entry in logprobs.values()), reverse=True)[:2]
    assert cold.sequences[0].cum_logprob - cold.sequences[1].cum_logprob == pytest.approx(a - b, abs=1e-4)
    assert hot.sequences[0].cum_logprob - hot.sequences[1].cum_logprob == pytest.approx((a - b) / 2, abs=1e-4)


def test_abort_frees_all_beams(llm: LLM) -> None:
    engine = llm.engine
    for steps in (0, 1, 2, 5):
        name = engine.add_request(PROMPTS[2], BeamSearchParams(beam_width=4, max_tokens=20))
        for _ in range(steps):
            engine.step()
        assert engine.abort_request(name) and not engine.has_unfinished_requests
        engine.scheduler.check()
        assert engine.scheduler.pool.num_used == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_width": 0}, "beam_width is 0, but must be an integer >= 1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"length_penalty": float("inf")}, "length_penalty is inf"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon', but must be True, False or \"never\""),
        ({"temperature": -1}, "temperature is -1"),
        ({"ignore_eos": 1}, "ignore_eos is 1"),
    ],
    ids=str,
)
def test_bad_parameters(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4} | fields)


def test_too_wide_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="beam_width is 17, but must be <= 16: 2 candidates for each"):
        llm.beam_search(["a"], BeamSearchParams(beam_width=17, max_tokens=4))
    with pytest.raises(InvalidRequestError, match="params is SamplingParams, but must be BeamSearchParams"):
        llm.beam_search(["a"], SamplingParams())  # type: ignore[arg-type]
    assert not llm.engine.has_unfinished_requests
