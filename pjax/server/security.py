"""The outermost layer: who may ask, how long a body may take, what no answer may tell; and the request's line of the log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pjax.server.bridge import ClientGoneError
from pjax.server.errors import ApiError, as_api_error, as_response
from pjax.server.logs import log_request
from pjax.server.server_config import ServerConfig

OPEN = ("/", "/health", "/ready", "/version", "/metrics")  # what needs no key, beside files under /static/; all else does
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
CLIENT_GONE = 499  # nginx's: stands in the log only
QUIET = ("/health", "/ready", "/metrics")  # asked every few seconds: their lines would bury the others


class Keys:
    """API keys. How long a check takes tells nothing of them."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, authorization: str | None) -> None:
        """ApiError 401 unless the header holds one of the keys; without any keys everybody may ask."""
        if not self._digests:
            return
        kind, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, always
        if kind.lower() != "bearer" or not any(matches):
            message = "the API key is wrong" if authorization else "there is no API key: send Authorization: Bearer KEY"
            raise ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})


class Gate:
    """ASGI middleware around everything."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._keys = Keys(config.api_keys)
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        if method == "HEAD":  # answered as GET is; uvicorn, which has the scope as it was, leaves the body out
            scope = {**scope, "method": "GET"}
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        started = time.monotonic()
        status = 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["X-Request-Id"] = request_id
                out["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            if path not in OPEN and not path.startswith("/static/"):
                self._keys.check(headers.get("authorization"))
            await self._app(scope, _Body(receive, self._config), send_noted)
        except ClientGoneError:
            status = CLIENT_GONE
        except Exception as error:
            answer = as_response(as_api_error(error))
            if not status:  # else the answer has begun: the connection is cut
                await answer(scope, receive, send_noted)
        finally:
            if not self._config.disable_log_requests and path not in QUIET:
                fields: dict[str, Any] = {"request_id": request_id, "seconds": round(time.monotonic() - started, 4)}
                log_request(method, path, status, fields | scope.get("pjax.note", {}))


class _Body:
    """`receive` that takes a body of so many bytes at most, within so many seconds."""

    def __init__(self, receive: Receive, config: ServerConfig) -> None:
        self._receive = receive
        self._seconds = config.body_timeout
        self._left = config.max_body_bytes
        self._until: float | None = None
        self._whole = False

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        loop = asyncio.get_running_loop()
        self._until = self._until or loop.time() + self._seconds
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"the body did not come within {self._seconds:g} seconds", {"Connection": "close"}) from None
        self._whole = not message.get("more_body", False)
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise HTTPException(413, headers={"Connection": "close"})
        return message
