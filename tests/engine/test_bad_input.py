"""Bad input is named at once and costs nobody else anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pjax import LLM, BeamSearchParams, CheckpointError, ConfigError, InvalidRequestError, SamplingParams, UnsupportedError
from pjax.config import EngineConfig
from tests.engine.common import OPTIONS, VOCAB, greedy, ids
from tests.tiny import write_model


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty, but must have at least 1 token"),
        ([], "prompt is empty"),
        ([1] * 96, "prompt has 96 tokens, but max_model_len is 96"),
        ([0, VOCAB], rf"prompt has token id {VOCAB} at 1, but ids must be in \[0, {VOCAB}\)"),
        ([0, -1], "prompt has token id -1 at 1"),
        ([0, 1.5], "prompt has 1.5 at 1, but must have token ids"),
        (7, "prompt is int, but must be text or token ids"),
    ],
    ids=str,
)
def test_bad_prompts_cost_nobody_anything(llm: LLM, prompt: Any, message: str) -> None:
    alone = ids(llm, "hello", greedy())
    engine = llm.engine
    engine.add_request("hello", greedy(), "good")
    outputs = engine.step()
    with pytest.raises(InvalidRequestError, match=message):
        engine.add_request(prompt, greedy(), "bad")
    while engine.has_unfinished_requests:
        outputs = engine.step()
    assert outputs[-1].request_id == "good"
    assert outputs[-1].outputs[0].token_ids == alone
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(["fine", prompt], greedy(), use_tqdm=False)
    assert not engine.has_unfinished_requests


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, r"n is 0, but must be an integer in \[1, 1024\]"),
        ({"n": 2, "temperature": 0}, "n is 2, but must be 1 at temperature 0"),
        ({"max_tokens": 0}, "max_tokens is 0, but must be an integer >= 1"),
        ({"max_tokens": -3}, "max_tokens is -3"),
        ({"temperature": -0.1}, "temperature is -0.1, but must be a finite number >= 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, r"top_p is 0, but must be in \(0, 1\]"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_k": -2}, "top_k is -2"),
        ({"min_p": 2}, "min_p is 2"),
        ({"seed": -1}, "seed is -1"),
        ({"logprobs": 21}, r"logprobs is 21, but must be an integer in \[0, 20\]"),
        ({"stop": [""]}, "stop is ''"),
        ({"stop_token_ids": [-1]}, "stop_token_ids is -1"),
    ],
    ids=str,
)
def test_bad_sampling_parameters(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**fields)


def test_tokens_that_the_model_does_not_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tokenizer of 260 tokens, and an end in the config, beyond a model's 200: nobody's step fails."""
    beyond = [*range(5000, 5008), 1 << 40]
    llm = LLM(write_model(tmp_path, vocab_size=200, eos_token_id=[7, 230, -1, *beyond]), **OPTIONS)
    assert f"end-of-sequence token ids {[-1, 230, 257, *beyond]} are ignored: the model's token ids are in [0, 200)" in caplog.messages
    plain = llm.generate([[1, 2, 3], [4, 5]], greedy(6), use_tqdm=False)
    held = SamplingParams(temperature=0, max_tokens=6, min_tokens=6, logit_bias={7: 100.0})
    outputs = llm.generate([[1, 2, 3], [4, 5]], [greedy(6), held], use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == plain[0].outputs[0].token_ids
    assert len(outputs[1].outputs[0].token_ids) == 6 and 7 not in outputs[1].outputs[0].token_ids
    found = llm.beam_search([[1, 2, 3]], BeamSearchParams(beam_width=4, max_tokens=2))  # 4 * 2 candidates, not 4 * 12 with all ends
    assert len(found[0].sequences) == 4
    [token] = llm.get_tokenizer().encode("\x7f")
    for fields, name in (
        ({"bad_words": ["\x7f"]}, r"bad_words \(tokens of '\\x7f'\)"),
        ({"bad_words": ["!\x7f"]}, r"bad_words \(.*\)"),
        ({"bad_words_ids": [[1], [token]]}, "bad_words_ids"),
        ({"stop_token_ids": [token], "min_tokens": 2}, "stop_token_ids"),
        ({"allowed_token_ids": [1, token]}, "allowed_token_ids"),
        ({"logit_bias": {token: 1.0}}, "logit_bias"),
    ):
        with pytest.raises(InvalidRequestError, match=rf"{name} has token id {token} at \d, but ids must be in \[0, 200\)"):
            llm.generate([[1, 2]], SamplingParams(**fields), use_tqdm=False)
    assert not llm.engine.has_unfinished_requests


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "bad_words_ids", "logit_bias"])
def test_negative_token_ids(name: str) -> None:
    """numpy would take them from the end."""
    given: dict[str, Any] = {"bad_words_ids": [[3], [-1]], "logit_bias": {-1: 1.0}}
    with pytest.raises(InvalidRequestError, match=rf"{name} is \[?-1\]?, but must be .*token ids? >= 0"):
        SamplingParams(**{name: given.get(name, [3, -1])})


def test_a_parameter_that_is_not_applied_is_refused() -> None:
    with pytest.raises(TypeError, match="length_penalty"):
        SamplingParams(length_penalty=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="tensor_parallel"):
        LLM("nowhere", tensor_parallel=2)


def test_a_request_that_can_never_fit_is_refused(folder: Path) -> None:
    llm = LLM(folder, **OPTIONS | {"num_pages": 2})
    with pytest.raises(InvalidRequestError, match=r"need 3 pages \(20 \+ 20 tokens\), but the page pool has 2"):
        llm.generate([list(range(20))], greedy(20), use_tqdm=False)
    assert len(ids(llm, [list(range(20))], greedy(12))) == 12


def test_bad_models(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        LLM(tmp_path, **OPTIONS)
    with pytest.raises(UnsupportedError, match=r"MambaForCausalLM is not supported; supported: .*LlamaForCausalLM"):
        LLM(write_model(tmp_path / "mamba", architectures=["MambaForCausalLM"]), **OPTIONS)
    with pytest.raises(ConfigError, match="max_model_len is 9000, but the model's own limit is 256"):
        LLM(folder, **OPTIONS | {"max_model_len": 9000})
    with pytest.raises(ConfigError, match="kv_cache_memory is 10 bytes, but one page takes 4096"):
        LLM(folder, **OPTIONS | {"num_pages": None, "kv_cache_memory": 10})
    broken = write_model(tmp_path / "broken")
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        LLM(broken, **OPTIONS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"page_size": 16.0}, "page_size is 16.0"),
        ({"page_size": True}, "page_size is True"),
        ({"lazy": "no"}, "lazy is 'no'"),
        ({"attention_backend": "bogus"}, "attention_backend is 'bogus', but must be one of native"),
        ({"memory_share": None}, "memory_share is None"),
        ({"max_num_batched_tokens": 2, "max_num_seqs": 4}, "max_num_batched_tokens is 2, but must be >= max_num_seqs 4"),
    ],
    ids=str,
)
def test_bad_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**fields)
