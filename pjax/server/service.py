"""What the endpoints share, and how an answer is sent: at once or as a stream of server-sent events."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pjax.outputs import RequestOutput
from pjax.server.answers import dumps
from pjax.server.bridge import Bridge, Generation, Params, while_connected
from pjax.server.errors import as_api_error, invalid
from pjax.server.metrics import ServerMetrics
from pjax.server.prompts import Prompts
from pjax.server.schemas import Sampling
from pjax.server.server_config import ServerConfig
from pjax.server.threads import Unjoined
from pjax.text.tokenizer import Tokenizer

log = logging.getLogger("pjax.server")
NUM_BODY_THREADS = 2


@dataclass(frozen=True)
class Service:
    """One server's parts."""

    config: ServerConfig
    bridge: Bridge
    prompts: Prompts
    metrics: ServerMetrics
    large_bodies: Unjoined = field(default_factory=lambda: Unjoined(NUM_BODY_THREADS, thread_name_prefix="pjax-body"))
    """Threads of their own, so that nobody's small request waits for them."""

    def close(self) -> None:
        """Ends the processes and threads that read and prepare requests; what they work on fails."""
        self.prompts.close()
        self.large_bodies.shutdown()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.prompts.tokenizer

    def start(self, body: Sampling, prompts: Sequence[Sequence[int]], params: Params, answer_id: str) -> Generation:
        """Puts prompts into the engine."""
        options = {"cache_salt": body.cache_salt, "priority": self._priority(body.priority)}
        return self.bridge.start(prompts, params, answer_id, options)

    def _priority(self, asked: int) -> int:
        """What the engine gets: 0 unless the operator lets clients choose."""
        most = self.config.max_client_priority
        if most and abs(asked) > most:
            raise invalid("priority", f"priority is {asked}, but must be in [{-most}, {most}]")
        return asked if most else 0


def new_id(kind: str) -> str:
    """An answer's id: cmpl-… or chatcmpl-…."""
    return f"{kind}-{uuid.uuid4().hex}"


def now() -> int:
    """Seconds since 1970, as answers tell when they were made."""
    return int(time.time())


def json_response(value: Mapping[str, Any]) -> Response:
    """An answer in one piece."""
    return Response(dumps(value), media_type="application/json")


def note(request: Request, body: Sampling, answer_id: str) -> None:
    """What the request's line of the log will tell."""
    request.scope["pjax.note"] = {"id": answer_id, "stream": bool(body.stream), **({"user": body.user} if body.user else {})}


def note_outputs(request: Request, outputs: Sequence[RequestOutput]) -> None:
    """What came of it, for the log."""
    noted = request.scope.setdefault("pjax.note", {})
    noted["prompt_tokens"] = sum(len(output.prompt_token_ids) for output in outputs)
    noted["cached_tokens"] = sum(output.num_cached_tokens or 0 for output in outputs)
    noted["generated_tokens"] = sum(len(sequence.token_ids) for output in outputs for sequence in output.outputs)
    noted["finish_reason"] = ",".join(sorted({str(sequence.finish_reason) for output in outputs for sequence in output.outputs}))
    first = [output.metrics.time_to_first_token for output in outputs if output.metrics.time_to_first_token is not None]
    if first:
        noted["ttft"] = round(min(first), 4)


async def finish(request: Request, generation: Generation) -> list[RequestOutput]:
    """The last outputs of all prompts; ClientGoneError, and nothing runs on, when the client leaves before."""
    try:
        outputs = await while_connected(request, generation.last())
    finally:
        await generation.close()
    note_outputs(request, outputs)
    return outputs


async def stream(
    request: Request, service: Service, generation: Generation, chunks: AsyncIterator[Mapping[str, Any]]
) -> EventSourceResponse:
    """A stream of chunks, which begins when the engine has queued all prompts. What is refused before that is an error of HTTP."""
    try:
        await while_connected(request, generation.ready())
    except BaseException:
        await generation.close()
        raise
    return _Events(generation, _events(chunks), service.config)


async def _events(chunks: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[dict[str, str]]:
    try:
        async for chunk in chunks:
            yield {"data": dumps(chunk)}
    except Exception as error:  # the status is sent already: the stream itself tells what happened
        yield {"data": dumps(as_api_error(error).body())}
    yield {"data": "[DONE]"}


class _Events(EventSourceResponse):
    """However the stream ends, its requests end with it."""

    def __init__(self, generation: Generation, events: AsyncIterator[dict[str, str]], config: ServerConfig) -> None:
        super().__init__(
            events,
            ping=config.keep_alive_seconds,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            send_timeout=config.send_timeout,
            sep="\n",
        )
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.warning("%s: the client did not read for %s seconds", self._generation.request_id, self.send_timeout)
        finally:
            with anyio.CancelScope(shield=True):
                await self._generation.close()
