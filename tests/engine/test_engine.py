"""The engine on a made-up checkpoint: no compile after warm-up, prompts, stops, seeds, log-probabilities, aborts."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pjax import LLM, CheckpointError, ConfigError, InvalidRequestError, LLMEngine, SamplingParams
from pjax.checkpoints.hf_folder import HFFolder
from pjax.config import EngineConfig
from pjax.runner.batch import Bucket, SampleShape
from pjax.runner.page_copies import COPY_SIZES
from pjax.runner.programs import Shape
from pjax.runner.runner import BLOCK_SIZES
from tests.engine.common import OPTIONS, VOCAB, greedy, ids
from tests.tiny import write_model

RULES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.5, "frequency_penalty": 1},
    {"logit_bias": {5: 3}, "typical_p": 0.5},
    {"allowed_token_ids": [1, 2, 3, 70], "bad_words_ids": [[1, 2], [3]]},
    {"prompt_logprobs": 2},
]


@pytest.mark.slow
def test_nothing_compiles_after_warm_up(folder: Path) -> None:
    llm = LLM(folder, **OPTIONS | {"lazy": False, "warmup": "all"})
    runner = llm.engine.runner
    warm = runner.num_compilations
    decode = [bucket for bucket in runner.buckets if bucket.decode_only]
    mixed = [bucket for bucket in runner.buckets if not bucket.decode_only]
    # Forward; sample, of as many rows as decode; score; writers of rows and of block tables.
    programs = len(decode) + len(mixed), len(decode), len(mixed), 2 + len(BLOCK_SIZES)
    assert warm == sum(programs) + 2 * len(COPY_SIZES), "a program for each shape; copies to the host and back"
    for bucket in runner.buckets:
        memory = runner.programs.get(bucket).memory_analysis()
        assert memory.alias_size_in_bytes == runner._pages.nbytes, "the pool is updated in place"
        sample = runner.programs.get(SampleShape(bucket.num_rows))
        assert sample.memory_analysis().alias_size_in_bytes == runner._tokens.nbytes, "the token table is updated in place"
        always = sample.as_text().partition("\nENTRY ")[2]
        assert always and " sort(" not in always and '"TopK"' not in always, "what no row asked for is computed for all"
    rng = np.random.default_rng(3)
    engine, left, most = llm.engine, 200, 0
    while left or engine.has_unfinished_requests:
        for _ in range(min(left, int(rng.integers(0, 4)))):
            left -= 1
            prompt = rng.integers(0, VOCAB, rng.integers(1, 60)).tolist()
            n = int(rng.choice([1, 1, 1, 2, 5]))
            wild = SamplingParams(
                n=n,
                max_tokens=int(rng.integers(1, 30)),
                temperature=float(rng.choice([0, 0.7])) if n == 1 else 1.0,
                top_k=int(rng.choice([0, 5])),
                top_p=float(rng.choice([1, 0.8])),
                logprobs=rng.choice([None, 3]),
                **rng.choice(RULES),
            )
            request_id = engine.add_request(prompt, wild)
            if rng.random() < 0.1:
                engine.abort_request(request_id)
        engine.step()
        engine.scheduler.check()
        most = max(most, engine.scheduler.num_running)
    assert runner.num_compilations == warm
    assert most == 4
    assert engine.scheduler.pool.num_used == 0


def test_prompts_of_every_shape(llm: LLM) -> None:
    tokens = llm.get_tokenizer().encode("hello")
    expected = ids(llm, "hello", greedy())
    assert ids(llm, ["hello"], greedy()) == expected
    assert ids(llm, tokens, greedy()) == expected
    assert ids(llm, np.array(tokens), greedy()) == expected
    both = llm.generate([tokens, "hell"], [greedy(), greedy(3)], use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in both] == [8, 3]
    assert both[0].outputs[0].token_ids == expected
    assert both[0].prompt is None
    assert both[1].prompt == "hell"
    assert llm.generate([], use_tqdm=False) == []
    with pytest.raises(InvalidRequestError, match="1 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], [greedy()], use_tqdm=False)


def test_outputs_tell_how_they_ended(llm: LLM) -> None:
    output = llm.generate("hello", greedy(5), use_tqdm=False)[0]
    assert output.finished
    assert output.prompt == "hello"
    assert output.prompt_token_ids == llm.get_tokenizer().encode("hello")
    assert output.outputs[0].finish_reason == "length"
    assert output.outputs[0].logprobs is None
    metrics = output.metrics
    assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finished_time
    tokens = output.outputs[0].token_ids
    stopped = llm.generate("hello", greedy(5, stop_token_ids=[tokens[2]]), use_tqdm=False)[0].outputs[0]
    first = tokens.index(tokens[2])
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == (tokens[: first + 1], "stop", tokens[2])


def test_stop_strings_end_the_text_before_them(llm: LLM) -> None:
    whole = llm.generate("hello", greedy(40), use_tqdm=False)[0].outputs[0].text
    stop = whole[7:9]
    first = whole.index(stop)
    cut = llm.generate("hello", greedy(40, stop=stop), use_tqdm=False)[0].outputs[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole[:first], "stop", stop)
    kept = llm.generate("hello", greedy(40, stop=[stop], include_stop_str_in_output=True), use_tqdm=False)[0].outputs[0]
    assert kept.text == whole[: first + len(stop)]
    assert not llm.engine.has_unfinished_requests


def test_text_grows_and_never_changes(llm: LLM) -> None:
    """Random bytes: most tokens end within a character."""
    engine = llm.engine
    engine.add_request("hello", SamplingParams(max_tokens=60, seed=5, ignore_eos=True))
    text = ""
    while engine.has_unfinished_requests:
        for output in engine.step():
            assert output.outputs[0].text.startswith(text)
            text = output.outputs[0].text
    assert text == llm.get_tokenizer().decode(output.outputs[0].token_ids)


def test_a_seed_decides_the_draws_whatever_runs_beside(llm: LLM) -> None:
    def drawn(seed: int) -> SamplingParams:
        return SamplingParams(max_tokens=12, seed=seed, top_p=0.95, ignore_eos=True)

    alone = ids(llm, "hello", drawn(11))
    crowd = llm.generate(["a", "hello", "other", "hello", "b", "hello"], [drawn(s) for s in (1, 11, 2, 12, 3, 11)], use_tqdm=False)
    assert crowd[1].outputs[0].token_ids == alone
    assert crowd[5].outputs[0].token_ids == alone
    assert crowd[3].outputs[0].token_ids != alone


def test_logprobs_are_of_the_model_itself(llm: LLM) -> None:
    output = llm.generate("hello", SamplingParams(max_tokens=6, temperature=0.5, seed=0, logprobs=4, ignore_eos=True), use_tqdm=False)[
        0
    ].outputs[0]
    assert output.cumulative_logprob == pytest.approx(sum(entry[t].logprob for entry, t in zip(output.logprobs, output.token_ids)))
    for entry, token in zip(output.logprobs, output.token_ids, strict=True):
        assert len(entry) in (4, 5)
        ranked = sorted(entry.values(), key=lambda one: one.rank)
        assert [one.rank for one in ranked[:4]] == [1, 2, 3, 4]
        assert all(a.logprob >= b.logprob for a, b in itertools.pairwise(ranked))
        assert entry[token].decoded_token == llm.get_tokenizer().decode([token], skip_special_tokens=False)


def test_chat_applies_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    output = llm.chat(messages, greedy(), use_tqdm=False)[0]
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert llm.get_tokenizer().decode(output.prompt_token_ids, skip_special_tokens=False) == expected
    assert output.prompt_token_ids[0] == 258
    assert [o.prompt_token_ids for o in llm.chat([messages, messages], greedy(1), use_tqdm=False)] == [output.prompt_token_ids] * 2
    own = llm.chat(
        messages, greedy(1), use_tqdm=False, chat_template="{{ word }} {{ messages | length }}", chat_template_kwargs={"word": "w"}
    )
    assert own[0].prompt_token_ids == llm.get_tokenizer().encode(f"w {len(messages)}", add_special_tokens=False)
    with pytest.raises(ConfigError, match=r"chat template none\.jinja is not readable"):
        llm.chat(messages, greedy(1), use_tqdm=False, chat_template="none.jinja")


def test_a_tokenizer_that_fails_ends_the_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read beside it: of a large model, minutes after the error otherwise."""
    reads, failed = list[str](), threading.Event()
    rows = HFFolder.rows

    def slow(self: HFFolder, name: str) -> Any:
        reads.append(name)
        assert failed.wait(20)
        return rows(self, name)

    monkeypatch.setattr(HFFolder, "rows", slow)
    with pytest.raises(CheckpointError, match="tokenizer"):
        LLM(write_model(tmp_path / "bare", tokenizer=False), **OPTIONS)
    failed.set()
    for thread in threading.enumerate():
        if thread.name.startswith("pjax-load"):
            thread.join(20)
    assert len(reads) <= 1


def test_without_a_tokenizer_ids_go_in_and_out(tmp_path: Path, llm: LLM) -> None:
    bare = LLM(write_model(tmp_path / "bare", tokenizer=False), skip_tokenizer_init=True, **OPTIONS)
    output = bare.generate([[1, 2, 3]], greedy(), use_tqdm=False)[0].outputs[0]
    assert output.token_ids == ids(llm, [[1, 2, 3]], greedy())
    assert output.text == ""
    for call, message in (
        (lambda: bare.generate("text", use_tqdm=False), "give token ids"),
        (lambda: bare.generate([[1]], SamplingParams(stop="a"), use_tqdm=False), "stop strings need a tokenizer"),
        (bare.get_tokenizer, "there is no tokenizer"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            call()


def test_end_of_sequence_ends_unless_ignored(llm: LLM) -> None:
    engine = llm.engine
    eos = ids(llm, "hello", greedy(4))[3]
    kept, engine._intake.eos_token_ids = engine._intake.eos_token_ids, frozenset({eos})
    try:
        output = llm.generate("hello", SamplingParams(temperature=0, max_tokens=9), use_tqdm=False)[0].outputs[0]
        assert (output.finish_reason, output.stop_reason, output.token_ids[-1]) == ("stop", None, eos)
        assert len(ids(llm, "hello", greedy(9))) == 9
    finally:
        engine._intake.eos_token_ids = kept


def test_abort_frees_pages_and_leaves_others_alone(folder: Path, llm: LLM) -> None:
    engine = LLMEngine(folder, EngineConfig(**{k: v for k, v in OPTIONS.items() if k != "progress"}), progress=False)
    for name in ("a", "b", "c"):
        engine.add_request("hello", greedy(), name)
    engine.step()
    assert engine.abort_request("b")
    assert not engine.abort_request("b")
    done = {}
    while engine.has_unfinished_requests:
        done |= {output.request_id: output.outputs[0].token_ids for output in engine.step() if output.finished}
    assert done == dict.fromkeys("ac", ids(llm, "hello", greedy()))
    assert engine.scheduler.pool.num_used == 0


@pytest.mark.parametrize("kind", [Bucket, SampleShape], ids=["forward", "sample"])
def test_an_interrupted_step_costs_time_only(llm: LLM, monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    """Ctrl-C after the pages, or the token table, were given away and before they came back."""
    engine, alone = llm.engine, ids(llm, "hello", greedy())
    engine.add_request("hello", greedy(), "kept")
    engine.step()
    programs = engine.runner.programs
    whole = programs.get

    def interrupted(shape: Shape) -> Any:
        def program(*arguments: Any) -> Any:
            made = whole(shape)(*arguments)
            if isinstance(shape, kind):
                raise KeyboardInterrupt
            return made

        return program

    with monkeypatch.context() as patch:
        patch.setattr(programs, "get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine.scheduler.check()
    outputs = []
    while engine.has_unfinished_requests:
        outputs = engine.step()
    assert outputs[0].outputs[0].token_ids == alone
    assert outputs[0].metrics.num_preemptions == 1


def test_a_refused_request_does_not_change_the_draws_of_others(folder: Path) -> None:
    made = []
    for refuse in (False, True):
        one = LLM(folder, **OPTIONS)
        if refuse:
            with pytest.raises(InvalidRequestError):
                one.generate("", use_tqdm=False)
        made.append(ids(one, "abc", SamplingParams(max_tokens=8)))
    assert made[0] == made[1]
    assert made[0] != ids(LLM(folder, **OPTIONS), "abc", SamplingParams(max_tokens=8, seed=0))


def test_prompts_as_vllm_and_numpy_give_them(llm: LLM) -> None:
    tokens = llm.get_tokenizer().encode("hello")
    expected = ids(llm, "hello", greedy())
    assert ids(llm, {"prompt": "hello"}, greedy()) == expected
    assert ids(llm, [{"prompt_token_ids": tokens}], greedy()) == expected
    assert ids(llm, np.array([tokens]), greedy()) == expected
    assert (
        ids(llm, [np.array(tokens)], SamplingParams(temperature=np.float32(0), max_tokens=np.int64(8), ignore_eos=True, stop=None))
        == expected
    )
    for bad in (b"abc", {1, 2}, None, 5, {"text": "a"}, np.ones((2, 2)), [b"abc"]):
        with pytest.raises(InvalidRequestError, match=r"prompts? (is|has)"):
            llm.generate(bad, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="sampling_params is int"):
        llm.generate("a", 5, use_tqdm=False)
    for bad in ({}, [], [[]], "hi", [["a"]]):
        with pytest.raises(InvalidRequestError, match=r"messages is|conversation 0 is"):
            llm.chat(bad, use_tqdm=False)


def test_generate_leaves_foreign_requests_alone(llm: LLM) -> None:
    llm.engine.add_request("foreign", greedy(), "0")
    with pytest.raises(InvalidRequestError, match="unfinished requests of add_request"):
        llm.generate("a", use_tqdm=False)
    assert llm.engine.add_request("another", greedy()) != "0"
    while llm.engine.has_unfinished_requests:
        llm.engine.step()


def test_the_text_of_a_stop_token_is_kept_only_if_asked(llm: LLM) -> None:
    tokens = ids(llm, "hello", greedy(6))
    stop, decode = tokens[3], llm.get_tokenizer().decode
    end = tokens.index(stop)
    for keep in (False, True):
        params = greedy(6, stop_token_ids=[stop], include_stop_str_in_output=keep)
        assert llm.generate("hello", params, use_tqdm=False)[0].outputs[0].text == decode(tokens[: end + keep])


def test_a_warm_up_takes_the_pools_memory_and_a_lazy_engine_does_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr("pjax.pallas_kernels.pages._touch", lambda pool, stop: calls.append(pool.shape))
    LLM(folder, **OPTIONS)
    assert not calls
    llm = LLM(folder, **OPTIONS | {"lazy": False, "warmup": "all"})
    assert calls == [llm.engine.runner._pages.shape]


def test_large_pages_come_with_the_first_large_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what a step holds: every prefill's bucket has as many rows as the engine."""
    calls: list[object] = []
    monkeypatch.setattr("pjax.runner.runner.use_large_pages", calls.append)
    monkeypatch.setattr("pjax.runner.runner.SHORT_STEP", 20)
    monkeypatch.setattr("pjax.runner.runner.FEW_ROWS", 2)
    llm = LLM(folder, **OPTIONS)
    ids(llm, list(range(20)), greedy(2))
    assert not calls
    for _ in range(2):
        ids(llm, list(range(50, 71)), greedy(2))
        assert len(calls) == 1
