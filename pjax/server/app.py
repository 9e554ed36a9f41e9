"""The application: endpoints around one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from pjax import __version__
from pjax.engine import AsyncLLM
from pjax.server import chat_completions, completions, errors, page, tokenization
from pjax.server.bridge import Bridge
from pjax.server.errors import ApiError
from pjax.server.logs import log_throughput
from pjax.server.metrics import ServerMetrics
from pjax.server.prompts import Prompts
from pjax.server.schemas import ErrorAnswer
from pjax.server.security import Gate
from pjax.server.server_config import ServerConfig
from pjax.server.service import Service, json_response, now


def create_app(llm: AsyncLLM, config: ServerConfig, engine_label: str = "0") -> FastAPI:
    """The server's application. `app.state.service` holds its parts; the caller shuts `llm` down.

    Args:
      engine_label: the metrics' label `engine`, which tells copies of a model apart.

    Raises ConfigError when the engine has no tokenizer.
    """
    metrics = ServerMetrics(llm, config.model_names[0], engine_label)
    service = Service(
        config=config,
        bridge=Bridge(llm, metrics, config.request_timeout),
        prompts=Prompts(llm, config),
        metrics=metrics,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(log_throughput(llm))
        if getattr(service.tokenizer, "chat_template", None):
            service.prompts.renderer.start()
        yield
        task.cancel()
        service.close()

    app = FastAPI(
        title="pjax",
        version=__version__,
        docs_url=None,  # its page fetches scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        responses={"4XX": {"model": ErrorAnswer, "description": "The request"}, "5XX": {"model": ErrorAnswer, "description": "The server"}},
    )
    app.state.service = service
    service.bridge.on_end.append(service.prompts.renderer.close)
    errors.install(app)
    for part in (completions, chat_completions, tokenization):
        app.include_router(part.router(service))
    _add_models(app, service)
    _add_health(app, service)
    page.install(app, service)
    app.add_middleware(Gate, config=config)
    if config.allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=config.allowed_origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    return app


def _add_models(app: FastAPI, service: Service) -> None:
    created = now()

    def shown(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "pjax",
            "root": service.config.model,
            "parent": None,
            "max_model_len": service.prompts.max_model_len,
        }

    @app.get("/v1/models")
    async def list_models() -> Response:
        """The model, under each of its names."""
        return json_response({"object": "list", "data": [shown(name) for name in service.config.model_names]})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        """One of the names."""
        return json_response(shown(service.prompts.model(name)))


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """200 while the engine is alive; 503 when it has died, hangs longer than --step-timeout, or is shut down."""
        if not service.bridge.llm.is_running:
            raise ApiError(503, "the engine is shut down" if service.bridge.llm.error is None else "the engine has died")
        return Response()

    @app.get("/ready", response_class=Response)
    async def ready() -> Response:
        """200 while requests are taken: 503 when /health gives that, and after SIGTERM."""
        service.bridge.check_open()
        return Response()

    @app.get("/version")
    async def version() -> Response:
        """The version of pjax."""
        return json_response({"version": __version__})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """In the text format of Prometheus; 503 when an engine that has died has no figures."""
        try:
            text = generate_latest(service.metrics.registry)
        except Exception as error:
            if service.bridge.llm.is_running:
                raise
            raise ApiError(503, "the engine has died") from error
        return Response(text, media_type=CONTENT_TYPE_LATEST)
