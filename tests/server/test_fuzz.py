"""Bodies made at random from the schemas and hostile values: no 5xx, no traceback, and a request that runs beside them stays the same."""

from __future__ import annotations

import json
import random
import threading
from typing import Any

import httpx2
import pytest

from pjax.server import schemas
from tests.server.common import Running, idle, wait_for
from tests.server.test_errors import error_of

BASE: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
}
MODELS = {
    "/v1/completions": schemas.CompletionRequest,
    "/v1/chat/completions": schemas.ChatRequest,
    "/tokenize": schemas.TokenizeChat,
    "/detokenize": schemas.DetokenizeRequest,
}
TEXTS = ["", "a", "\ud800", "\x00", "1", "01", "é😀" * 5, "x" * 5000, "never", "auto", "none", "tiny"]
NUMBERS = [0, 1, 2, -1, 20, 2**31, 2**63, 10**30, 1.5, 0.5, float("nan"), float("inf"), -0.0, 1e308]
LISTS = [[], [[]], [{}], ["a"], [1], [1, "a"], [None], ["a"] * 70, [0] * 300, [[1], [2]], [{"type": "text", "text": "x"}]]
MAPPINGS = [{}, {"a": 1}, {"1": 1}, {"1": 1, "01": 2}, {"-1": 1}, {"self": 1}, {"range": 1, "loop": 2}, {"include_usage": True}]
VALUES: list[Any] = [None, True, False, *TEXTS, *NUMBERS, *LISTS, *MAPPINGS, json.loads("[" * 300 + "]" * 300)]
FINE: dict[str, list[Any]] = {
    "prompt": [["a", "b"], [1, 2], [[1], [2]], "\x00", "é😀"],
    "temperature": [0, 1.5, None],
    "n": [2],
    "top_p": [0.5],
    "top_k": [5],
    "seed": [3, 2**63 - 1],
    "stop": ["a", ["a", "b"]],
    "logit_bias": [{"5": 1.5, "6": -100}],
    "bad_words": [["x"]],
    "allowed_token_ids": [[1, 2, 3]],
    "min_tokens": [1],
    "repetition_penalty": [1e-3, 1e3],
    "cache_salt": ["s"],
    "truncate_prompt_tokens": [1, -1],
    "stream": [True],
    "logprobs": [1, True],
    "echo": [True],
    "return_token_ids": [True],
    "priority": [-(2**31)],
    "user": ["u\n"],
    "chat_template_kwargs": [{"self": 1, "range": 2}],
    "add_generation_prompt": [False],
    "tokens": [[1, 2, 3], []],
}
SEED = 25


def fuzzed(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body, of which one to three fields have values that are fine or odd."""
    path = rng.choice(list(BASE))
    body = dict(BASE[path])
    names = list(MODELS[path].model_fields)
    for _ in range(rng.choice([1, 2, 3])):
        if rng.random() < 0.7:
            name = rng.choice([name for name in names if name in FINE])
            body[name] = rng.choice(FINE[name])
        else:
            body[rng.choice(names)] = rng.choice(VALUES)
    if path == "/v1/chat/completions" and rng.random() < 0.3:
        parts = list(schemas.Message.model_fields)
        body["messages"] = [{"role": "user", "content": "a"} | {rng.choice(parts): rng.choice(VALUES)} for _ in range(2)]
    if rng.random() < 0.1:
        body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": rng.choice(VALUES)}}]
    return path, body


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.extended)])
def test_fuzzed_bodies_fail_alone(server: Running, client: httpx2.Client, count: int, caplog: pytest.LogCaptureFixture) -> None:
    canary = {"prompt": "San Francisco", "temperature": 0, "max_tokens": 24, "ignore_eos": True, "return_token_ids": True}
    expected = client.post("/v1/completions", json=canary).json()["choices"][0]["token_ids"]
    seen: list[list[int]] = []
    ended = threading.Event()

    def sing() -> None:
        with httpx2.Client(base_url=server.url, timeout=120) as own:
            while not ended.is_set() or not seen:
                seen.append(own.post("/v1/completions", json=canary).json()["choices"][0]["token_ids"])

    thread = threading.Thread(target=sing)
    thread.start()
    rng = random.Random(SEED)
    statuses: dict[int, int] = {}
    try:
        for _ in range(count):
            path, body = fuzzed(rng)
            with client.stream("POST", path, content=json.dumps(body), headers={"content-type": "application/json"}) as response:
                response.read()
            assert response.status_code < 500, (path, body, response.text)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            if response.status_code == 400:
                error = error_of(response)
                assert error["param"] in (None, *body) or "is missing" in error["message"], (path, body, error)
    finally:
        ended.set()
        thread.join(120)
    assert seen and all(tokens == expected for tokens in seen)
    assert min(statuses[200], statuses[400]) > count // 10
    assert "Traceback" not in caplog.text
    wait_for(lambda: idle(server.url))
