"""/v1/completions on the wire: what comes back is what the engine says offline, in OpenAI's shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest

from pjax import LLM, BeamSearchParams, SamplingParams
from tests.server.common import MODEL, ScriptedLLM, chunks, start

PATH = "/v1/completions"


def offline(llm: LLM, prompt: Any, **params: Any) -> Any:
    return llm.generate(prompt, SamplingParams(**params), use_tqdm=False)[0]


def test_the_articles_request(post: Any, llm: LLM) -> None:
    answer = post(PATH, model=MODEL, prompt="San Francisco is a", max_tokens=7, temperature=0)
    expected = offline(llm, "San Francisco is a", max_tokens=7, temperature=0)
    [choice] = answer["choices"]
    assert (choice["index"], choice["text"], choice["finish_reason"]) == (0, expected.outputs[0].text, "length")
    assert choice["logprobs"] is None
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion" and answer["model"] == MODEL
    assert answer["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": 18,
        "completion_tokens": 7,
        "total_tokens": 25,
        "prompt_tokens_details": None,
    }


@pytest.mark.parametrize("prompt", ["ab", [64, 65], ["ab", "cde"], [[64, 65], [66, 67, 68]]])
def test_prompts_of_every_kind(post: Any, llm: LLM, prompt: Any) -> None:
    answer = post(PATH, prompt=prompt, max_tokens=5, temperature=0, ignore_eos=True, return_token_ids=True)
    expected = llm.generate(prompt, SamplingParams(max_tokens=5, temperature=0, ignore_eos=True), use_tqdm=False)
    assert [choice["token_ids"] for choice in answer["choices"]] == [output.outputs[0].token_ids for output in expected]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [output.prompt_token_ids for output in expected]
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))


def test_samples_of_several_prompts_by_seed(post: Any, llm: LLM) -> None:
    params = {"max_tokens": 6, "temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 7, "n": 2, "ignore_eos": True}
    answer = post(PATH, prompt=["ab", "cd"], return_token_ids=True, **params)
    expected = llm.generate(["ab", "cd"], SamplingParams(**params), use_tqdm=False)
    flat = [sequence.token_ids for output in expected for sequence in output.outputs]
    assert [choice["token_ids"] for choice in answer["choices"]] == flat
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert len({tuple(ids) for ids in flat}) > 1


def test_a_stream_says_what_the_whole_says(client: httpx2.Client, post: Any) -> None:
    body = {"prompt": ["ab", "San"], "max_tokens": 20, "temperature": 0, "logprobs": 2, "return_token_ids": True, "echo": False}
    whole = post(PATH, **body)
    streamed = chunks(client, PATH, **body, stream_options={"include_usage": True})
    last = streamed.pop()
    assert last["choices"] == [] and last["usage"] | {"prompt_tokens_details": 0} == whole["usage"] | {"prompt_tokens_details": 0}
    assert len({chunk["id"] for chunk in streamed}) == 1 and all(chunk["usage"] is None for chunk in streamed)
    for choice in whole["choices"]:
        parts = [chunk["choices"][0] for chunk in streamed if chunk["choices"][0]["index"] == choice["index"]]
        assert len(parts) > 5, "the answer did not come in pieces"
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            assert [entry for part in parts for entry in part["logprobs"][name]] == choice["logprobs"][name]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]


def test_usage_in_every_chunk(client: httpx2.Client) -> None:
    streamed = chunks(
        client, PATH, prompt="ab", max_tokens=4, temperature=0, ignore_eos=True, stream_options={"continuous_usage_stats": True}
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in streamed]
    assert counts == sorted(counts) and counts[-1] == 4


def test_logprobs(post: Any, llm: LLM) -> None:
    answer = post(PATH, prompt="San", max_tokens=4, temperature=0, logprobs=3, ignore_eos=True)
    found = answer["choices"][0]["logprobs"]
    expected = offline(llm, "San", max_tokens=4, temperature=0, logprobs=3, ignore_eos=True).outputs[0]
    assert expected.logprobs is not None
    for index, (token, entries) in enumerate(zip(expected.token_ids, expected.logprobs, strict=True)):
        assert found["token_logprobs"][index] == pytest.approx(entries[token].logprob, abs=1e-4)
        assert found["tokens"][index] == entries[token].decoded_token
        by_text = {}
        for entry in sorted(entries.values(), key=lambda entry: -entry.logprob)[:3]:
            by_text.setdefault(entry.decoded_token, pytest.approx(entry.logprob, abs=1e-4))
        assert found["top_logprobs"][index] == by_text
    lengths = [len(text) for text in found["tokens"]]
    assert found["text_offset"] == [sum(lengths[:i]) for i in range(4)]


def test_stop_strings_and_tokens(post: Any, llm: LLM) -> None:
    expected = offline(llm, "San", max_tokens=12, temperature=0, ignore_eos=True).outputs[0]
    token = next(token for token in expected.token_ids[2:] if expected.token_ids.count(token) == 1)
    [choice] = post(PATH, prompt="San", max_tokens=12, temperature=0, ignore_eos=True, stop_token_ids=[token], return_token_ids=True)[
        "choices"
    ]
    assert choice["token_ids"] == expected.token_ids[: expected.token_ids.index(token) + 1]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token)
    stop = next(c for c in expected.text[2:] if c.isascii() and expected.text.count(c) == 1)
    [choice] = post(PATH, prompt="San", max_tokens=12, temperature=0, ignore_eos=True, stop=stop)["choices"]
    assert choice["text"] == expected.text[: expected.text.index(stop)] and choice["stop_reason"] == stop
    [choice] = post(PATH, prompt="San", max_tokens=12, temperature=0, ignore_eos=True, stop=[stop], include_stop_str_in_output=True)[
        "choices"
    ]
    assert choice["text"] == expected.text[: expected.text.index(stop) + 1]


def test_echo(post: Any, client: httpx2.Client) -> None:
    alone = post(PATH, prompt="San", max_tokens=4, temperature=0)["choices"][0]["text"]
    assert post(PATH, prompt="San", max_tokens=4, temperature=0, echo=True)["choices"][0]["text"] == "San" + alone
    assert post(PATH, prompt=[50, 64], max_tokens=4, temperature=0, echo=True)["choices"][0]["text"].startswith("Sa")
    streamed = chunks(client, PATH, prompt="San", max_tokens=4, temperature=0, echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == "San" + alone


def test_nothing_but_the_prompt(post: Any, client: httpx2.Client) -> None:
    answer = post(PATH, prompt="San", max_tokens=0, echo=True)
    assert answer["choices"][0]["text"] == "San" and answer["usage"]["completion_tokens"] == 0
    streamed = chunks(client, PATH, prompt="San", max_tokens=0, echo=True)
    assert [chunk["choices"][0]["text"] for chunk in streamed] == ["San"]


def test_beam_search(post: Any, llm: LLM) -> None:
    params = {"max_tokens": 5, "length_penalty": 0.5, "early_stopping": True}
    answer = post(PATH, prompt="San", use_beam_search=True, n=3, return_token_ids=True, **params)
    [expected] = llm.beam_search(["San"], BeamSearchParams(beam_width=3, **params))
    assert [choice["token_ids"] for choice in answer["choices"]] == [sequence.tokens[3:] for sequence in expected.sequences]
    best = post(PATH, prompt="San", use_beam_search=True, best_of=3, n=1, return_token_ids=True, **params)["choices"]
    assert [choice["token_ids"] for choice in best] == [expected.sequences[0].tokens[3:]]


def test_a_prompt_is_truncated_at_its_left(post: Any) -> None:
    body = {"max_tokens": 3, "temperature": 0, "return_token_ids": True}
    cut = post(PATH, prompt="abcdefgh", truncate_prompt_tokens=3, **body)["choices"][0]
    whole = post(PATH, prompt="fgh", **body)["choices"][0]
    assert cut == whole
    fits = post(PATH, prompt="b" * 200, truncate_prompt_tokens=-1, **body)
    assert fits["usage"]["total_tokens"] == 128 and fits["choices"][0]["prompt_token_ids"] == [65] * 125


def test_a_salt_keeps_prefixes_apart(post: Any) -> None:
    prompt = "a prompt that is longer than one page of sixteen tokens"

    def cached(**body: Any) -> int:
        return post(PATH, prompt=prompt, max_tokens=1, **body)["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(cache_salt="x"), cached(cache_salt="x"), cached(cache_salt="y")] == [0, 48, 0]


def test_max_tokens_is_what_is_left_unless_given(post: Any) -> None:
    answer = post(PATH, prompt="a" * 120, max_tokens=None, temperature=0, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 8
    assert post(PATH, prompt="a" * 120, temperature=0, ignore_eos=True)["usage"]["completion_tokens"] == 8


def test_tokens_of_a_text_and_back(post: Any, client: httpx2.Client) -> None:
    answer = post("/tokenize", prompt="abc", return_token_strs=True)
    assert answer == {"count": 3, "max_model_len": 128, "tokens": [64, 65, 66], "token_strs": ["a", "b", "c"]}
    assert post("/detokenize", tokens=[64, 65, 66]) == {"prompt": "abc"}
    chat = post("/tokenize", messages=[{"role": "user", "content": "hi"}])
    assert post("/detokenize", tokens=chat["tokens"])["prompt"] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert client.post("/detokenize", json={"tokens": [260]}).json()["error"]["param"] == "tokens"


def test_models(client: httpx2.Client) -> None:
    [model] = client.get("/v1/models").json()["data"]
    assert model["id"] == MODEL and model["max_model_len"] == 128 and model["object"] == "model"
    assert client.get(f"/v1/models/{MODEL}").json() == model
    assert client.get("/v1/models/other/one").status_code == 404
    assert client.get("/version").json().keys() == {"version"}
    assert client.get("/health").status_code == client.get("/ready").status_code == 200


@pytest.mark.parametrize(("most", "passed"), [(0, 0), (5, -3)])
def test_a_priority_is_passed_on_where_the_operator_lets_clients_choose(tmp_path: Path, most: int, passed: int) -> None:
    seen: list[dict[str, Any]] = []

    class Noting(ScriptedLLM):
        def generate(self, prompt: list[int], params: Any, request_id: str, **options: Any) -> Any:
            seen.append({name: options[name] for name in ("cache_salt", "priority")})
            return super().generate(prompt, params, request_id, **options)

    with start(Noting(tmp_path, "x"), max_client_priority=most) as server:
        for more in ({}, {"priority": -3, "cache_salt": "s"}):
            httpx2.post(server.url + PATH, json={"prompt": "a"} | more).raise_for_status()
        refused = httpx2.post(server.url + PATH, json={"prompt": "a", "priority": -(2**31)})
        assert refused.status_code == (400 if most else 200)
        assert not most or refused.json()["error"]["param"] == "priority"
    assert seen[:2] == [{"cache_salt": None, "priority": 0}, {"cache_salt": "s", "priority": passed}]
    assert all(abs(options["priority"]) <= most for options in seen)
