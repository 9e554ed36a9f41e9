"""/v1/chat/completions: templates, streams, log-probabilities and tool calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pjax import LLM, SamplingParams
from pjax.server.tools import ToolReader
from tests.server.common import ScriptedLLM, chunks, start

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
WEATHER = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}}
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool | tojson }}]{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}{% endfor %}"
)
MARKS = {"hermes": "{# <tool_call> #}", "mistral": "{# [TOOL_CALLS] #}", "llama3_json": '{# "parameters" #}'}


def offline(llm: LLM, messages: Any, **params: Any) -> Any:
    return llm.chat(messages, SamplingParams(**params), use_tqdm=False)[0].outputs[0]


def test_an_answer(post: Any, llm: LLM) -> None:
    answer = post(PATH, messages=HI, max_tokens=9, temperature=0)
    expected = offline(llm, HI, max_tokens=9, temperature=0)
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["usage"]["prompt_tokens"] == 21 and answer["usage"]["completion_tokens"] == 9
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert post(PATH, messages=parts, max_completion_tokens=9, temperature=0)["choices"] == answer["choices"]


def test_a_stream_says_what_the_whole_says(client: httpx2.Client, post: Any) -> None:
    body = {"messages": HI, "max_tokens": 12, "n": 2, "seed": 3, "temperature": 1.0, "logprobs": True, "top_logprobs": 2}
    whole = post(PATH, **body)
    streamed = chunks(client, PATH, **body, stream_options={"include_usage": True})
    assert streamed.pop()["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        parts = [chunk["choices"][0] for chunk in streamed if chunk["choices"][0]["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""} and parts[-1]["delta"] == {}
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        content = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert content == choice["logprobs"]["content"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]


def test_logprobs(post: Any, llm: LLM) -> None:
    found = post(PATH, messages=HI, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    expected = offline(llm, HI, max_tokens=3, temperature=0, logprobs=2)
    for entry, token, entries in zip(found, expected.token_ids, expected.logprobs, strict=True):
        assert entry["logprob"] == pytest.approx(entries[token].logprob, abs=1e-4)
        assert entry["token"] == entries[token].decoded_token and bytes(entry["bytes"]).decode() == entry["token"]
        best = sorted((e.logprob for e in entries.values()), reverse=True)[:2]
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(best, abs=1e-4)
    alone = post(PATH, messages=HI, max_tokens=1, temperature=0, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert alone[0]["top_logprobs"] == []


def test_a_final_message_is_continued(post: Any) -> None:
    messages = [*HI, {"role": "assistant", "content": "I am"}]
    body: dict[str, Any] = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    ids = post("/tokenize", **body)["tokens"]
    assert post("/detokenize", tokens=ids)["prompt"].endswith("<|im_start|>assistant\nI am")
    echoed = post(PATH, **body, max_tokens=2, temperature=0, echo=True)["choices"][0]["message"]["content"]
    assert echoed == "I am" + post(PATH, **body, max_tokens=2, temperature=0)["choices"][0]["message"]["content"]


def test_an_answer_can_be_sent_back_as_it_came(post: Any) -> None:
    message = post(PATH, messages=HI, max_tokens=2, temperature=0)["choices"][0]["message"]
    post(PATH, messages=[*HI, message | {"annotations": [], "audio": None, "tool_calls": None}, *HI], max_tokens=2)


CALLS = [("weather", {"city": "Oslo"}), ("weather", {"city": "Köln", "days": [1, 2]})]
BODIES = [json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) for name, arguments in CALLS]
TEXTS = {
    "hermes": f"Let me see.<tool_call>\n{BODIES[0]}\n</tool_call>\n<tool_call>{BODIES[1]}</tool_call>",
    "mistral": f"Let me see.[TOOL_CALLS] [{', '.join(BODIES)}]",
    "llama3_json": "; ".join(body.replace('"arguments"', '"parameters"') for body in BODIES),
}


def read(parser: str, text: str, size: int) -> tuple[str, list[tuple[str, Any]]]:
    reader, content, calls = ToolReader(parser), "", []
    for at in range(0, max(len(text), 1), size):
        more, found = reader.feed(text[at : at + size], last=at + size >= len(text))
        content += more
        calls += found
    assert reader.num_calls == len(calls) == len({call.id for call in calls})
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
@pytest.mark.parametrize("parser", TEXTS)
def test_calls_are_read_however_the_text_is_cut(parser: str, size: int) -> None:
    content, calls = read(parser, TEXTS[parser], size)
    assert content == ("" if parser == "llama3_json" else "Let me see.") and calls == CALLS


NO_CALLS = [
    ("hermes", "no call <tool"),
    ("hermes", "<tool_call>{broken</tool_call> after"),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", "a < b and <tool_calls>"),
    ("hermes", "<tool_call>" + "[" * 3000 + "</tool_call>"),
    ("hermes", ""),
    ("mistral", "[TOOL_CALLS] [{broken"),
    ("mistral", "[TOOL"),
    ("mistral", "[1, 2]"),
    ("llama3_json", '{"name": "f"'),
    ("llama3_json", '{"a": 1}'),
    ("llama3_json", "plain {text}"),
    ("llama3_json", "<|python"),
    ("llama3_json", '{"name": ' + "[" * 3000),
]


@pytest.mark.parametrize("size", [1, 5, 10_000])
@pytest.mark.parametrize(("parser", "text"), NO_CALLS, ids=lambda value: str(value)[:30])
def test_what_is_no_call_stays_text(parser: str, text: str, size: int) -> None:
    assert read(parser, text, size) == (text, [])


def test_other_forms_of_calls() -> None:
    assert read("mistral", '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[ARGS]{}', 4) == ("", [("f", {"a": 1}), ("g", {})])
    assert read("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": ";"}}', 4) == ("", [("f", {"a": ";"})])
    assert read("hermes", '<tool_call>{"name": "f", "arguments": "{}"}', 4) == ("", [("f", {})])  # cut before its end mark
    [call] = ToolReader("mistral").feed('[TOOL_CALLS][{"name": "f", "arguments": {}}]', last=True)[1]
    assert len(call.id) == 9 and call.id.isalnum()


@pytest.mark.parametrize("parser", TEXTS)
def test_calls_on_the_wire(tmp_path: Path, parser: str) -> None:
    llm = ScriptedLLM(tmp_path, TEXTS[parser], template=MARKS[parser] + TOOL_TEMPLATE)
    with start(llm) as server, httpx2.Client(base_url=server.url, timeout=60) as client:
        body = {"messages": HI, "tools": [WEATHER], "tool_choice": "auto"}
        [choice] = client.post(PATH, json=body).json()["choices"]
        assert '[{"type": "function", "function": {"name": "weather"' in llm.prompts[0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == (None if parser == "llama3_json" else "Let me see.")
        called = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in choice["message"]["tool_calls"]]
        assert called == CALLS and all(c["type"] == "function" for c in choice["message"]["tool_calls"])

        streamed = [chunk["choices"][0] for chunk in chunks(client, PATH, **body)]
        deltas = [call for part in streamed for call in part["delta"].get("tool_calls", ())]
        assert [call["index"] for call in deltas] == [0, 1] and streamed[-1]["finish_reason"] == "tool_calls"
        assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in deltas] == CALLS

        [choice] = client.post(PATH, json=body | {"parallel_tool_calls": False}).json()["choices"]
        assert len(choice["message"]["tool_calls"]) == 1
        again = [*HI, choice["message"], {"role": "tool", "tool_call_id": choice["message"]["tool_calls"][0]["id"], "content": "rain"}]
        client.post(PATH, json=body | {"messages": again}).raise_for_status()
        assert 'weather({"city": "Oslo"})<tool>rain' in llm.prompts[-1]

        [choice] = client.post(PATH, json=body | {"tool_choice": "none"}).json()["choices"]
        assert choice["message"]["content"] == TEXTS[parser] and "tool_calls" not in choice["message"]
        assert "[{" not in llm.prompts[-1]


def test_special_tokens_are_kept_where_they_begin_a_call(tmp_path: Path) -> None:
    llm = ScriptedLLM(tmp_path, "x", template=MARKS["mistral"] + TOOL_TEMPLATE)
    llm.engine.tokenizer.backend.add_special_tokens(["[TOOL_CALLS]"])
    llm.engine.tokenizer.special_ids |= {llm.engine.tokenizer.token_to_id("[TOOL_CALLS]")}
    with start(llm) as server:
        for tools in ([WEATHER], None):
            httpx2.post(server.url + PATH, json={"messages": HI, "tools": tools}).raise_for_status()
    assert [params.skip_special_tokens for params in llm.params] == [False, True]
