"""A prompt whose next token cannot be sampled is answered with 500 and the reason; all others are answered as ever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pjax import LLM, AsyncLLM, SamplingParams
from tests.server.common import OPTIONS, Running, chunks, idle, metrics, start, wait_for
from tests.tiny import write_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT, OTHER = [20, 21, 22], [90, 91]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 10, "ignore_eos": True}
MESSAGE = "could be sampled: the model's logits hold NaN or infinity"


@pytest.fixture(scope="module")
def tokens(llm: LLM) -> list[list[int]]:
    """What the healthy model says."""
    return [one.outputs[0].token_ids for one in llm.generate([PROMPT, OTHER], SamplingParams(**GREEDY), use_tqdm=False)]


@pytest.fixture(scope="module")
def poison(tokens: list[list[int]]) -> int:
    """The fourth token that the healthy model gives: the damaged one has an infinite embedding of it."""
    token = tokens[0][3]
    assert token not in tokens[0][:3] + PROMPT + OTHER + tokens[1]
    return token


@pytest.fixture(scope="module")
def damaged(poison: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = write_model(tmp_path_factory.mktemp("damaged"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][poison] = np.inf
    save_file(tensors, folder / "model.safetensors")
    with start(AsyncLLM(folder, **OPTIONS), folder) as running:
        yield running


@pytest.fixture
def client(damaged: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=damaged.url, timeout=120) as client:
        yield client


def error_of(response: httpx2.Response) -> str:
    assert response.status_code == 500, response.text
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("server_error", None, None)
    return str(error["message"])


def test_a_prompt_that_fails_at_once_is_answered_with_500(client: httpx2.Client, poison: int, tokens: list[list[int]]) -> None:
    response = client.post(COMPLETIONS, json=GREEDY | {"prompt": [poison, 5]})
    assert error_of(response).startswith(f"no token 2 {MESSAGE}")
    sampled = {"prompt": [poison, 5], "n": 2, "max_tokens": 4}
    assert MESSAGE in error_of(client.post(COMPLETIONS, json=sampled))
    [told] = chunks(client, COMPLETIONS, **GREEDY, prompt=[poison, 5])  # a stream has begun when the request is queued
    assert told["error"]["type"] == "server_error" and told["error"]["message"].startswith(f"no token 2 {MESSAGE}")
    good = client.post(COMPLETIONS, json=GREEDY | {"prompt": OTHER, "return_token_ids": True})
    assert good.json()["choices"][0]["token_ids"] == tokens[1]


def test_one_that_fails_later_is_answered_with_500_or_an_error_in_the_stream(
    client: httpx2.Client, poison: int, tokens: list[list[int]], damaged: Running
) -> None:
    before = metrics(damaged.url)
    assert error_of(client.post(COMPLETIONS, json=GREEDY | {"prompt": PROMPT})).startswith(f"no token 7 {MESSAGE}")
    *parts, last = chunks(client, COMPLETIONS, **GREEDY, prompt=PROMPT, return_token_ids=True)
    streamed = [token for part in parts for token in part["choices"][0]["token_ids"]]
    assert streamed == tokens[0][: len(streamed)] and 1 <= len(streamed) <= 4
    assert last["error"]["type"] == "server_error" and last["error"]["message"].startswith(f"no token 7 {MESSAGE}")
    assert all(part["choices"][0]["finish_reason"] is None for part in parts)
    wait_for(lambda: idle(damaged.url))
    after = metrics(damaged.url)
    assert after["vllm:request_success_total.error"] - before["vllm:request_success_total.error"] == 2
    assert after["vllm:request_success_total.abort"] == before["vllm:request_success_total.abort"]


def test_of_chats_too(client: httpx2.Client, poison: int) -> None:
    """The first token is the poison, which the second step reads."""
    body = GREEDY | {"messages": [{"role": "user", "content": "hi"}], "logit_bias": {str(poison): 100}}
    assert MESSAGE in error_of(client.post(CHAT, json=body))
    assert MESSAGE in chunks(client, CHAT, **body)[-1]["error"]["message"]


def test_of_beams_too_and_of_several_prompts_the_answer_is_one(client: httpx2.Client, poison: int) -> None:
    beams = {"prompt": [poison], "n": 2, "max_tokens": 4, "use_beam_search": True}
    assert MESSAGE in error_of(client.post(COMPLETIONS, json=beams))
    assert MESSAGE in error_of(client.post(COMPLETIONS, json=GREEDY | {"prompt": [OTHER, [poison]]}))
