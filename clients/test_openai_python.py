"""OpenAI's Python package: sync, async, streams, errors, log-probabilities, tools."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest

HI = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture
def client(served: dict[str, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served['url']}/v1", api_key=served["key"], max_retries=0) as client:
        yield client


@pytest.fixture
def tools(served: dict[str, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served['tools_url']}/v1", api_key=served["key"], max_retries=0) as client:
        yield client


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="San Francisco is a", max_tokens=7, temperature=0, logprobs=2)
    [choice] = whole.choices
    assert choice.text and choice.finish_reason == "length" and whole.usage and whole.usage.completion_tokens == 7
    assert choice.logprobs and len(choice.logprobs.tokens) == 7 and all(len(top) >= 1 for top in choice.logprobs.top_logprobs)
    pieces = list(client.completions.create(model="tiny", prompt="San Francisco is a", max_tokens=7, temperature=0, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == choice.text and pieces[-1].choices[0].finish_reason == "length"
    extra = {"top_k": 5, "min_p": 0.01, "ignore_eos": True, "use_beam_search": False}
    several = client.completions.create(model="tiny", prompt=["a", "b"], n=2, seed=1, max_tokens=3, extra_body=extra)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


def test_chats(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HI, max_completion_tokens=8, temperature=0, logprobs=True, top_logprobs=3)
    content = whole.choices[0].message.content
    assert content and whole.choices[0].logprobs and len(whole.choices[0].logprobs.content) == 8
    assert [len(entry.top_logprobs) for entry in whole.choices[0].logprobs.content] == [3] * 8
    options = {"model": "tiny", "messages": HI, "max_completion_tokens": 8, "temperature": 0, "stream_options": {"include_usage": True}}
    with client.chat.completions.stream(**options) as stream:
        events = list(stream)
        final = stream.current_completion_snapshot
    assert "".join(event.delta for event in events if event.type == "content.delta") == content
    assert final.choices[0].message.content == content and final.usage and final.usage.completion_tokens == 8
    again = [*HI, whole.choices[0].message, *HI]
    assert client.chat.completions.create(model="tiny", messages=again, max_tokens=2).choices


def test_async(served: dict[str, str], client: openai.OpenAI) -> None:
    alone = client.completions.create(model="tiny", prompt="abc", max_tokens=9, temperature=0).choices[0].text

    async def one(asynchronous: openai.AsyncOpenAI) -> str:
        stream = await asynchronous.completions.create(model="tiny", prompt="abc", max_tokens=9, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served['url']}/v1", api_key=served["key"]) as asynchronous:
            return await asyncio.gather(*[one(asynchronous) for _ in range(8)])

    assert asyncio.run(main()) == [alone] * 8


def test_errors(client: openai.OpenAI, served: dict[str, str]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a" * 500)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="no field that pjax applies"):
        client.completions.create(model="tiny", prompt="a", extra_body={"unheard_of": 1})
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    assert client.models.retrieve("tiny").id == "tiny" == client.models.list().data[0].id


def test_tools(tools: openai.OpenAI) -> None:
    message = tools.chat.completions.create(model="tiny", messages=HI, tools=[WEATHER]).choices[0].message
    [call] = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    answer = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    assert tools.chat.completions.create(model="tiny", messages=[*HI, message, answer], tools=[WEATHER]).choices
    with tools.chat.completions.stream(model="tiny", messages=HI, tools=[WEATHER]) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls" and final.message.content == "Let me see."
    assert final.message.tool_calls[0].function.name == "weather"
