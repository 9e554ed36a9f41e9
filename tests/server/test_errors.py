"""What is refused is refused by its name, with OpenAI's shape of an error, and nothing of the server's inside in it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pjax import EngineDeadError, InvalidRequestError, QueueFullError, RequestFailedError, SamplingParams
from pjax.server.sampling import BEAM_NEUTRAL, PASSED
from tests.server.common import MODEL, ScriptedLLM, start

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def error_of(response: httpx2.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text and ".py" not in response.text
    error = body["error"]
    assert isinstance(error, dict) and isinstance(error["message"], str) and error["message"]
    return error


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"foo": 1}, "foo"),
    ({"suffix": "x"}, "suffix"),
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [260]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": "a" * 128}, "prompt"),
    ({"prompt": ["a"] * 257}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.0}, "max_tokens"),
    ({"max_tokens": 128}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 10**400}, "seed"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x"] * 65}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop_token_ids": [260]}, "stop_token_ids"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": "yes"}, "stream"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"length_penalty": 1.0}, "length_penalty"),
    ({"stream": True, "best_of": 2}, "best_of"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"use_beam_search": True, "stream": True}, "stream"),
    ({"use_beam_search": True, "top_p": 0.5}, "top_p"),
    ({"use_beam_search": True, "logprobs": 1}, "logprobs"),
    ({"use_beam_search": True, "stop": "x"}, "stop"),
    ({"use_beam_search": True, "seed": 1}, "seed"),
    ({"use_beam_search": True, "echo": True}, "echo"),
    ({"use_beam_search": True, "n": 17}, "n"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
]


@pytest.mark.parametrize(("changes", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_named(client: httpx2.Client, changes: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 4} | changes
    response = client.post(COMPLETIONS, content=json.dumps(body), headers={"content-type": "application/json"})
    error = error_of(response)
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert param in error["message"]


WRONG_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "hi", "extra": 1}]}, "messages"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),  # this template shows no tools
    ({"tool_choice": "required"}, "tool_choice"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"functions": []}, "functions"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
    ({"store": True}, "store"),
]


@pytest.mark.parametrize(("changes", "param"), WRONG_CHATS, ids=lambda value: str(value)[:40])
def test_a_wrong_field_of_a_chat_is_named(client: httpx2.Client, changes: dict[str, Any], param: str) -> None:
    error = error_of(client.post(CHAT, json={"messages": [{"role": "user", "content": "hi"}]} | changes))
    assert error["param"] == param and param in error["message"]


def test_fields_that_change_nothing_are_fine_in_a_beam_search_and_others_are_named(client: httpx2.Client) -> None:
    body = {"prompt": "a", "max_tokens": 2, "use_beam_search": True, "n": 2}
    for name, values in BEAM_NEUTRAL.items():
        assert client.post(COMPLETIONS, json=body | {name: values[-1]}).status_code == 200, name
    for name, value in {"logit_bias": {"5": 1.5}, "bad_words": ["x"], "typical_p": 0.5, "min_tokens": 2}.items():
        assert error_of(client.post(COMPLETIONS, json=body | {name: value}))["param"] == name


def test_every_field_is_passed_on() -> None:
    """A new field of SamplingParams gets a place here, or the server would refuse or drop it."""
    elsewhere = {"max_tokens", "logprobs", "detokenize", "truncate_prompt_tokens", "bad_words_ids", "logits_processors"}
    assert {field.name for field in fields(SamplingParams)} - elsewhere <= set(PASSED)


def test_bodies_that_are_no_request(client: httpx2.Client) -> None:
    for content, kind in (
        (b"{bad", "application/json"),
        (b"[1]", "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b"", "application/json"),
        (b'{"prompt": "a"}', "text/plain"),
        (b"x" * 100, "multipart/form-data"),
    ):
        error_of(client.post(COMPLETIONS, content=content, headers={"content-type": kind}))
    error_of(client.post(COMPLETIONS, content=b'{"\\ud800": 1, "prompt": "a"}', headers={"content-type": "application/json"}))


def test_paths_and_methods(client: httpx2.Client) -> None:
    error_of(client.get("/v1/nothing"), 404)
    error_of(client.get(COMPLETIONS), 405)
    assert error_of(client.post(COMPLETIONS, json={"model": "gpt-4", "prompt": "a"}), 404)["code"] == "model_not_found"
    assert error_of(client.post(COMPLETIONS, json={"prompt": "a" * 200}))["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (QueueFullError("9 requests wait already"), 429, "9 requests wait"),
        (EngineDeadError("the engine died: secret"), 503, "the engine has died"),
        (RequestFailedError("steps with this request failed: secret"), 500, "failed"),
        (InvalidRequestError("stop is 3, but must be text"), 400, "stop is 3"),
        (RuntimeError("secret"), 500, "failed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_engine(tmp_path: Path, error: Exception, status: int, told: str, stream: bool) -> None:
    """Before the first output they have their status, for streams as well; what they hold of the inside stays inside."""
    with start(ScriptedLLM(tmp_path, "x", error=error)) as server:
        response = httpx2.post(server.url + COMPLETIONS, json={"prompt": "a", "stream": stream})
        found = error_of(response, status)
        assert told in found["message"] and "secret" not in response.text
        assert (response.headers.get("retry-after") == "1") == (status == 429)
        again = httpx2.post(server.url + COMPLETIONS, json={"prompt": ["a", "b"], "stream": stream})  # one of several fails: all end
        assert error_of(again, status) and server.llm.num_open == 0


def test_a_request_that_takes_too_long(tmp_path: Path) -> None:
    with start(ScriptedLLM(tmp_path, "x" * 100, pause=0.05), request_timeout=0.3) as server:
        assert error_of(httpx2.post(server.url + COMPLETIONS, json={"prompt": "a"}), 504)["code"] == "timeout"
        text = httpx2.post(server.url + COMPLETIONS, json={"prompt": "a", "stream": True}).text
        lines = [line for line in text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]" and "0.3 seconds" in json.loads(lines[-2][6:])["error"]["message"]
        assert server.llm.num_open == 0
