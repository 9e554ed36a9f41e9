"""LangChain's ChatOpenAI."""

from __future__ import annotations

import asyncio

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"rain in {city}"


def test_invoke_stream_and_batch(served: dict[str, str]) -> None:
    chat = ChatOpenAI(base_url=f"{served['url']}/v1", api_key=served["key"], model="tiny", temperature=0, max_tokens=8, seed=1)
    messages = [SystemMessage("be short"), HumanMessage("hi")]
    whole = chat.invoke(messages)
    assert whole.content and whole.response_metadata["finish_reason"] == "length" and whole.usage_metadata["output_tokens"] == 8
    assert "".join(piece.content for piece in chat.stream(messages)) == whole.content
    assert [answer.content for answer in chat.batch([messages] * 4)] == [whole.content] * 4
    assert asyncio.run(chat.ainvoke(messages)).content == whole.content
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke(messages)
    assert len(scored.response_metadata["logprobs"]["content"]) == 8


def test_tools(served: dict[str, str]) -> None:
    chat = ChatOpenAI(base_url=f"{served['tools_url']}/v1", api_key=served["key"], model="tiny").bind_tools([weather])
    answer = chat.invoke("what is the weather?")
    [call] = answer.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Oslo"}) and answer.content == "Let me see."
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage) and result.content == "rain in Oslo"
    assert chat.invoke([HumanMessage("what is the weather?"), answer, result]).tool_calls
