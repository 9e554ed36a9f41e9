"""Whom `chat` and `complete` talk with: a model in this process, or a server that speaks OpenAI's protocol."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from pjax.cli.common import ONE_HOST, add_model, add_sampling, open_engine, sampling_params
from pjax.cli.flags import Parser
from pjax.errors import InvalidRequestError, PjaxError, RequestFailedError

Message = dict[str, str]


class ServerError(PjaxError):
    """The server refused, or is not there."""


class Partner(Protocol):
    """Streams what it has to say, piece by piece. Closing the iterator ends the request."""

    name: str

    def complete(self, prompt: str) -> Iterator[str]:
        """Continues a text."""

    def chat(self, messages: Sequence[Message]) -> Iterator[str]:
        """Answers the last message."""

    def close(self) -> None:
        """Frees what it holds."""


def add_partner(parser: Parser) -> None:
    """--url or a model, and how it answers."""
    group = parser.add_argument_group("server, instead of a model here")
    group.add_argument("--url", metavar="URL", help="of a running server, such as http://localhost:8000/v1")
    group.add_argument("--api-key", metavar="KEY", help="for it (better in PJAX_API_KEY than in the list of processes)")
    add_model(parser, leave_out=("seed", *ONE_HOST), max_num_seqs=1, lazy=True)
    add_sampling(parser, max_tokens=512)


def open_partner(args: argparse.Namespace) -> Partner:
    """The server that --url names, or else the model."""
    fields = sampling_params(args)
    return Remote(args, fields) if args.url else Local(args, fields)


class Local:
    """A model in this process."""

    def __init__(self, args: argparse.Namespace, params: Any) -> None:
        self._engine = open_engine(args, seed=0)
        self._params = params
        self.name = str(args.model or "demo")

    def complete(self, prompt: str) -> Iterator[str]:
        """Continues a text."""
        yield from self._stream(prompt)

    def chat(self, messages: Sequence[Message]) -> Iterator[str]:
        """Answers through the model's chat template."""
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise InvalidRequestError("the checkpoint has no tokenizer")
        yield from self._stream(tokenizer.encode(tokenizer.apply_chat_template(list(messages)), add_special_tokens=False))

    def _stream(self, prompt: str | list[int]) -> Iterator[str]:
        request_id, shown = self._engine.add_request(prompt, self._params), 0
        try:
            while self._engine.has_unfinished_requests:
                for output in self._engine.step():
                    if output.request_id != request_id:
                        continue
                    answer = output.outputs[0]
                    yield answer.text[shown:]
                    shown = len(answer.text)
                    if answer.finish_reason == "error":
                        raise RequestFailedError(str(answer.stop_reason))
        finally:
            self._engine.abort_request(request_id)

    def close(self) -> None:
        """Frees the page pool."""
        self._engine.close()


class Remote:
    """A model behind OpenAI's protocol."""

    def __init__(self, args: argparse.Namespace, params: Any) -> None:
        import httpx2

        key = args.api_key or os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.Client(base_url=base_url(args.url), headers=headers, timeout=httpx2.Timeout(600, connect=10))
        self._failures: Any = httpx2.HTTPError
        self._fields = request_fields(params)
        try:
            self.name = args.model or self._first_model()
        except BaseException:
            self.close()
            raise

    def _first_model(self) -> str:
        try:
            response = self._client.get("models")
        except self._failures as error:
            raise ServerError(f"{self._client.base_url} does not answer: {error}") from error
        if response.status_code != 200:
            raise ServerError(error_text(response))
        return str(response.json()["data"][0]["id"])

    def complete(self, prompt: str) -> Iterator[str]:
        """Continues a text."""
        for choice in self._stream("completions", {"prompt": prompt}):
            yield choice.get("text") or ""

    def chat(self, messages: Sequence[Message]) -> Iterator[str]:
        """Answers the last message."""
        for choice in self._stream("chat/completions", {"messages": list(messages)}):
            yield choice.get("delta", {}).get("content") or ""

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        body = {"model": self.name, "stream": True, **self._fields, **body}
        try:
            with self._client.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise ServerError(error_text(response))
                for event in events(response.iter_lines()):
                    if "error" in event:
                        raise ServerError(str(event["error"].get("message", event["error"])))
                    yield from event.get("choices", ())
        except self._failures as error:
            raise ServerError(f"{self._client.base_url} stopped answering: {error}") from error

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()


def base_url(url: str) -> str:
    """With /v1, whether it was given or not."""
    url = url.rstrip("/")
    return url + "/" if url.endswith("/v1") else url + "/v1/"


def request_fields(params: Any) -> dict[str, Any]:
    """Fields of a request, those that are not the defaults."""
    from dataclasses import fields

    named = {item.name: (getattr(params, item.name), item.default) for item in fields(params)}
    always = {"max_tokens", "temperature"}
    found = {name: value for name, (value, default) in named.items() if name in always or value != default}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The objects of a stream of server-sent events, up to [DONE]. OpenAI's protocol has one line of data in an event."""
    for line in lines:
        if line.startswith("data:"):
            data = line[5:].strip()
            if data == "[DONE]":
                return
            yield json.loads(data)


def error_text(response: Any) -> str:
    """What a refusal says, in one line."""
    try:
        told = response.json()["error"]
        text = told["message"] if isinstance(told, dict) else told
    except (ValueError, KeyError, TypeError):
        text = response.text[:200]
    return f"{response.status_code}: {text}"
