"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`, and no traceback ever."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pjax.errors import EngineDeadError, InvalidRequestError, QueueFullError, UnsupportedError

log = logging.getLogger("pjax.server")

RETRY_AFTER = 1  # seconds
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 503: "service_unavailable", 504: "timeout"}
_FIELD = re.compile(r"[a-z][a-z_]*")


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
        return ApiError(400, str(error), param=found.group() if found else None)
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed to answer this request; its log has more")


def as_response(error: ApiError) -> Response:
    """The answer. Non-ASCII is escaped: a message may quote what is no Unicode text."""
    return Response(json.dumps(error.body()), error.status, error.headers, media_type="application/json")


def _of_validation(errors: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]) -> ApiError:
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    path = [str(part) for part in first["loc"][1:]]
    if not path:
        return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json")
    name = path[0]
    description = getattr(fields.get(name), "description", None)
    several = len({tuple(error["loc"]) for error in errors if list(map(str, error["loc"][1:2])) == [name]}) > 1
    if first["type"] == "extra_forbidden":
        where = ".".join(path)
        return invalid(name, f"{where} is no field that pjax applies")
    if first["type"] == "missing":
        return invalid(name, f"{'.'.join(path)} is missing")
    if description and several:
        return invalid(name, f"{name} must be {description}")
    return invalid(name, f"{'.'.join(path)} is {_short(first.get('input'))}: {first['msg']}")


def _short(value: Any) -> str:
    if isinstance(value, str | int | float | None):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:80]}…"
    return f"of type {type(value).__name__}"


def install(app: FastAPI) -> None:
    """Gives every error of the app OpenAI's shape."""

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return as_response(_of_validation(error.errors(), _fields_of(request)))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = {
            404: f"there is no {request.url.path}",
            405: f"{request.url.path} does not take {request.method}",
            413: "the body is too large",
        }
        return as_response(ApiError(error.status_code, what.get(error.status_code, str(error.detail)), headers=error.headers))

    async def on_any(request: Request, error: Exception) -> Response:
        return as_response(as_api_error(error))

    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    for kind in (ApiError, QueueFullError, EngineDeadError, InvalidRequestError, UnsupportedError):
        app.add_exception_handler(kind, on_any)


def _fields_of(request: Request) -> Mapping[str, Any]:
    body = getattr(request.scope.get("route"), "body_field", None)
    annotation = getattr(getattr(body, "field_info", None), "annotation", None)
    return getattr(annotation, "model_fields", {})
