"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`, and no traceback ever."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pjax.errors import EngineDeadError, InvalidRequestError, QueueFullError, UnsupportedError

log = logging.getLogger("pjax.server")

RETRY_AFTER = 1  # seconds
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 503: "service_unavailable", 504: "timeout"}
_FIELD = re.compile(r"[a-z][a-z_]*")
UNKNOWN_FIELD = "unknown_field"  # pydantic's name for our error
SENT_AS = {"max_tokens": ("max_completion_tokens",), "prompt": ("messages",), "beam_width": ("best_of", "n")}
"""Names of parameters in the engine -> fields that requests set them by."""


class ApiError(Exception):
    """An answer other than 200.

    Args:
      status: of HTTP.
      message: for the client; it tells nothing of the server's inside.
      param: the field that is wrong.
      code: OpenAI's word for what happened.
      headers: to send with it.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.is_named = True  # `param` was named where the request is checked, not read out of a message
        self.status = status
        self.message = message
        self.param = param
        self.code = _CODES.get(status) if code is None else code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str, message: str, code: str | None = None) -> ApiError:
    """A field of the request is wrong."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: BaseException) -> ApiError:
    """What a client may know of an error; one that nobody foresaw is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), headers={"Retry-After": str(RETRY_AFTER)})
    if isinstance(error, EngineDeadError):
        return ApiError(503, "the engine has died; the server is ending")
    if isinstance(error, InvalidRequestError | UnsupportedError):
        found = _FIELD.match(str(error))
        told = ApiError(400, str(error), param=found.group() if found else None)
        told.is_named = False
        return told
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed to answer this request; its log has more")


def named_as_sent(error: ApiError, sent: Collection[str] | None) -> ApiError:
    """The error with `param` as the request called the field, or None where it sent none of that name.

    Args:
      sent: names of the body's fields; None when there is no valid body.
    """
    if sent is None or error.param is None or error.param in sent or error.status != 400:
        return error
    error.param = next((name for name in SENT_AS.get(error.param, ()) if name in sent), error.param if error.is_named else None)
    return error


def as_response(error: ApiError) -> Response:
    """The answer. Non-ASCII is escaped: a message may quote what is no Unicode text."""
    return Response(json.dumps(error.body()), error.status, error.headers, media_type="application/json")


def validation_error(errors: Sequence[Mapping[str, Any]], fields: Mapping[str, Any], value: Any) -> ApiError:
    """What is wrong with a body, in one sentence.

    Args:
      errors: pydantic's, at least one; those of one union have its members in their places.
      fields: the model's.
      value: the body that was validated.
    """
    name = str(errors[0]["loc"][0]) if errors[0]["loc"] else None
    own = [error for error in errors if error["loc"][:1] == (name,)] or list(errors)
    # A union's members fail each for its own reason: one that looked into the value tells more than one that wants another type.
    first = next((error for error in own if not _is_of_type(error)), own[0])
    if first["type"] == UNKNOWN_FIELD:
        unknown = str(first["ctx"]["name"])
        path = [*_path(first["loc"], value), unknown]
        return invalid(path[0], f"{'.'.join(path):.200} is no field that pjax applies")
    path = _path(first["loc"], value) or [name or "body"]
    name = path[0]
    if first["type"] == "missing":
        return invalid(name, f"{'.'.join(path)} is missing")
    description = getattr(fields.get(name), "description", None)
    if description and len(own) > 1 and _is_of_type(first):
        return invalid(name, f"{name} must be {description}")
    return invalid(name, f"{'.'.join(path)} is {_short(first.get('input'))}: {first['msg']}")


def _is_of_type(error: Mapping[str, Any]) -> bool:
    return str(error["type"]).endswith(("_type", "literal_error"))


def _path(places: Sequence[str | int], value: Any) -> list[str]:
    """An error's place in the value itself, without the names of union members that pydantic puts between."""
    path: list[str] = []
    for index, place in enumerate(places):
        is_key = isinstance(value, Mapping) and place in value
        if is_key or (isinstance(value, list) and isinstance(place, int) and place < len(value)):
            value = value[place]
        elif not (index == len(places) - 1 and isinstance(value, Mapping)):  # else a field that is missing
            continue
        path.append(str(place)[:100])
    return path


def _short(value: Any) -> str:
    if isinstance(value, str | int | float | None):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:80]}…"
    return f"of type {type(value).__name__}"


def install(app: FastAPI) -> None:
    """Gives every error of the app OpenAI's shape."""

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = {
            404: f"there is no {request.url.path}",
            405: f"{request.url.path} does not take {request.method}",
            413: "the body is too large",
        }
        return as_response(ApiError(error.status_code, what.get(error.status_code, str(error.detail)), headers=error.headers))

    async def on_any(request: Request, error: Exception) -> Response:
        return as_response(named_as_sent(as_api_error(error), request.scope.get("pjax.fields")))

    app.add_exception_handler(HTTPException, on_http)
    for kind in (ApiError, QueueFullError, EngineDeadError, InvalidRequestError, UnsupportedError):
        app.add_exception_handler(kind, on_any)
