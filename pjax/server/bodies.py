"""Bodies of requests: read, bounded before they are parsed, and validated with at most a few errors.

FastAPI would parse and validate on the event loop, and pydantic would make an error for each item of each member of a union. Here the
number of JSON values is bounded first, lists stop at their first error (`pjax.server.schemas`), and large bodies leave the loop.
"""

from __future__ import annotations

import asyncio
import json
import re
import typing
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from pjax.server.errors import ApiError, validation_error

SMALL = 32 << 10  # bytes of a body that is parsed on the event loop
BYTES_PER_MARK = 16  # of the largest body, for each comma, bracket and string that a body may have
BYTES_PER_CONTAINER = 64  # of the largest body, for each list and object: these take the most memory for their text
_MARKS = re.compile(rb'[\[{,]|"[^"\\]*+(?:\\.[^"\\]*+)*+"?+', re.DOTALL)
NOT_JSON = "the body must be a JSON object, sent as Content-Type: application/json"


class BodyRoute(APIRoute):
    """A route whose parameters are `body`, a model or a union of models, and perhaps `request`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, which reads the body itself. The signature still tells FastAPI what the OpenAPI document shows."""
        call = self.dependant.call
        assert call is not None
        hints = typing.get_type_hints(call)
        models = typing.get_args(hints["body"]) or (hints["body"],)

        async def handle(request: Request) -> Response:
            raw = await request.body()
            service = request.app.state.service
            work = partial(parse, raw, request.headers.get("content-type"), models, service.config.max_body_bytes)
            body, names = work() if len(raw) <= SMALL else await asyncio.get_running_loop().run_in_executor(service.large_bodies, work)
            request.scope["pjax.fields"] = names
            given = {"body": body} | ({"request": request} if "request" in hints else {})
            return typing.cast(Response, await call(**given))

        return handle


def parse(raw: bytes, content_type: str | None, models: tuple[type[BaseModel], ...], max_bytes: int) -> tuple[BaseModel, frozenset[str]]:
    """(the validated body, the names of its fields). ApiError 400, with the field's name, for anything else."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if not raw or not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        raise ApiError(400, NOT_JSON)
    check_size(raw, max_bytes)
    try:
        value = json.loads(raw)
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # no Unicode, a number of thousands of digits, nested too deeply
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, NOT_JSON)
    model = model_of(value, models)
    names = frozenset(value.keys() & model.model_fields.keys())
    try:
        return model.model_validate(value), names
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False), model.model_fields, value) from None


def model_of(value: dict[str, Any], models: tuple[type[BaseModel], ...]) -> type[BaseModel]:
    """The first model whose required fields are all there; else the first."""
    for model in models:
        if all(name in value for name, field in model.model_fields.items() if field.is_required()):
            return model
    return models[0]


def check_size(raw: bytes, max_bytes: int) -> None:
    """ApiError 400 when a body has more JSON values than its memory is worth; texts of any content count as one value."""
    most, most_containers = max_bytes // BYTES_PER_MARK, max(max_bytes // BYTES_PER_CONTAINER, 16)
    if len(raw) <= SMALL or (
        sum(map(raw.count, (b"[", b"{", b",", b'"'))) <= most and raw.count(b"[") + raw.count(b"{") <= most_containers
    ):
        return
    num_containers = 0
    for num_marks, found in enumerate(_MARKS.finditer(raw), 1):
        num_containers += raw[found.start()] in b"[{"
        if num_marks > most or num_containers > most_containers:
            raise ApiError(400, f"the body has more than {most} JSON values, or more than {most_containers} lists and objects")
