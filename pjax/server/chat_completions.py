"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pjax.outputs import CompletionOutput, RequestOutput
from pjax.server.answers import Cursor, Logprobs, chat_logprobs, prompt_logprobs, usage
from pjax.server.bodies import BodyRoute
from pjax.server.bridge import Generation
from pjax.server.errors import invalid
from pjax.server.sampling import sampling_params
from pjax.server.schemas import ChatRequest
from pjax.server.service import Service, finish, json_response, new_id, note, note_outputs, now, stream
from pjax.server.tools import Call, ToolReader, has_special_marker, parser_for


def router(service: Service) -> APIRouter:
    """The endpoint."""
    routes = APIRouter(route_class=BodyRoute)

    @routes.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answers a conversation."""
        return await _Chat(service, body).answer(request)

    return routes


@dataclass
class _Choice:
    """One answer while it streams."""

    reader: ToolReader | None
    cursor: Cursor = field(default_factory=Cursor)


class _Chat:
    """One request."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        self.service = service
        self.body = body
        self.id = new_id("chatcmpl")
        self.model = service.prompts.model(body.model)
        self.created = now()
        self.parser: str | None = None
        if body.tools and body.tool_choice != "none":
            self.parser = parser_for(service.tokenizer, service.config.tool_parser)
            if self.parser is None:
                raise invalid("tools", "tools are given, but this model's chat template or the server's setting tool_parser has none")
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs", "top_logprobs is given, but logprobs is not set")
        self.max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            raise invalid("max_tokens", "max_tokens and max_completion_tokens differ: give one of them")
        more: dict[str, Any] = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
        if self.parser is not None and has_special_marker(service.tokenizer, self.parser):
            more["skip_special_tokens"] = False
        self.params = sampling_params(body, service.config, max_tokens=self.max_tokens, **more)

    async def answer(self, request: Request) -> Response:
        note(request, self.body, self.id)
        may_be_cut = self.body.truncate_prompt_tokens is not None
        with self.service.bridge.preparing():
            ids = await self.service.prompts.of_chat(self.body, with_tools=self.parser is not None, may_be_cut=may_be_cut)
        ids = self.service.prompts.truncate(ids, self.body.truncate_prompt_tokens, self.max_tokens)
        self.service.prompts.check(ids, self.max_tokens, "messages")
        generation = self.service.start(self.body, [ids], self.params, self.id)
        if self.body.stream:
            return await stream(request, self.service, generation, self._chunks(request, generation))
        [output] = await finish(request, generation)
        answer = self._wrapped("chat.completion", [self._choice(sequence) for sequence in output.outputs[: self.body.n]])
        answer["usage"] = usage([output])
        if self.body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = output.prompt_token_ids
        return json_response(answer)

    def _wrapped(self, kind: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _before(self) -> str:
        """What `echo` puts before the answer: the last message, where the answer continues or follows it."""
        content = self.body.messages[-1].content if self.body.echo else ""
        return "\n".join(part.text for part in content) if isinstance(content, list) else content or ""

    def _reader(self) -> ToolReader | None:
        return None if self.parser is None else ToolReader(self.parser)

    def _kept(self, calls: list[Call], num_before: int) -> list[Call]:
        """Without parallel_tool_calls the first call alone."""
        return calls if self.body.parallel_tool_calls is not False else calls[: max(1 - num_before, 0)]

    def _logprobs(self, ids: Sequence[int], logprobs: Logprobs | None) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(self.service.tokenizer, ids, logprobs or (), self.body.top_logprobs or 0)

    def _choice(self, sequence: CompletionOutput) -> dict[str, Any]:
        reader = self._reader()
        text, calls = (sequence.text, list[Call]()) if reader is None else reader.feed(sequence.text, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": self._before() + text, "refusal": None}
        if calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [call.shown() for call in self._kept(calls, 0)]
        reason = "tool_calls" if calls and sequence.finish_reason == "stop" else sequence.finish_reason
        logprobs = self._logprobs(sequence.token_ids, sequence.logprobs)
        choice = {"index": sequence.index, "message": message, "logprobs": logprobs, "finish_reason": reason}
        choice["stop_reason"] = sequence.stop_reason
        if self.body.return_token_ids:
            choice["token_ids"] = sequence.token_ids
        return choice

    async def _chunks(self, request: Request, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        options = self.body.stream_options
        choices: dict[int, _Choice] = {}
        latest: RequestOutput | None = None
        async for _, output in generation:
            latest = output
            for place, sequence in enumerate(output.outputs[: self.body.n]):
                made = []
                if place not in choices:
                    choices[place] = _Choice(self._reader())
                    made.append(self._shown(place, {"role": "assistant", "content": self._before()}))
                if not choices[place].cursor.ended:
                    made += self._deltas(place, choices[place], sequence)
                for choice in made:
                    chunk = self._wrapped("chat.completion.chunk", [choice])
                    if options is not None:
                        chunk["usage"] = usage([output]) if options.continuous_usage_stats else None
                    yield chunk
        if latest is None:
            return
        note_outputs(request, [latest])
        if options is not None and options.include_usage:
            yield self._wrapped("chat.completion.chunk", []) | {"usage": usage([latest])}

    def _shown(self, index: int, delta: Mapping[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _deltas(self, index: int, choice: _Choice, sequence: CompletionOutput) -> list[dict[str, Any]]:
        """The choices of the next chunks: new text and calls, then the end."""
        text, ids, found = choice.cursor.advance(sequence)
        reader, last, calls, num_before = choice.reader, choice.cursor.ended, list[Call](), 0
        if reader is not None:
            num_before = reader.num_calls
            text, calls = reader.feed(text, last=last)
            calls = self._kept(calls, num_before)
        logprobs = self._logprobs(ids, found) if found else None
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [{"index": num_before + i} | call.shown() for i, call in enumerate(calls)]
        made = []
        if delta or logprobs is not None or (ids and self.body.return_token_ids):
            made.append(self._shown(index, delta, logprobs))
            if self.body.return_token_ids:
                made[-1]["token_ids"] = ids
        if last:
            called = reader is not None and reader.num_calls > 0 and sequence.finish_reason == "stop"
            made.append(self._shown(index, {}, None, "tool_calls" if called else sequence.finish_reason))
            made[-1]["stop_reason"] = sequence.stop_reason
        return made
