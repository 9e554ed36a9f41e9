"""The page at / and what it draws: its files, and the engine's state, a byte for each page of the pool."""

from __future__ import annotations

import base64
import time
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

from pjax.engine import EngineStats
from pjax.server.service import Service, json_response

FOLDER = Path(__file__).with_name("static")
CACHED = 255  # a free page that is still found by what it holds
MOST = 254  # owners that a byte tells
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
HEADERS = {"Content-Security-Policy": POLICY + "form-action 'none'; frame-ancestors 'none'", "Cache-Control": "no-cache"}


def install(app: FastAPI, service: Service) -> None:
    """Adds the page, its files under /static/, and /engine/state."""
    started = time.time()

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """The page."""
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    @app.get("/engine/state")
    async def engine_state() -> Response:
        """Figures of the engine, and each page's owners (base64 of zlib of a byte a page; 255 is free, but cached)."""
        stats = service.bridge.llm.stats()
        figures = {
            "started": started,
            "time": time.time(),
            "model": service.config.model_names[0],
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "page_size": service.bridge.llm.engine.config.page_size,
            "num_pages": stats.num_pages,
            "used": stats.num_used_pages,
            "cached": stats.num_cached_pages,
            "shared": stats.num_shared_pages,
            "preemptions": stats.num_preemptions,
            "steps": stats.num_steps,
            "compilations": stats.num_compilations,
            "prompt_tokens": stats.prompt_tokens,
            "generation_tokens": stats.generation_tokens,
            "prefix_cache_queries": stats.prefix_cache_queries,
            "prefix_cache_hits": stats.prefix_cache_hits,
        }
        return json_response(figures | {"pages": packed(page_bytes(stats))})

    app.mount("/static", StaticFiles(directory=FOLDER), name="static")


def page_bytes(stats: EngineStats) -> npt.NDArray[np.uint8]:
    """[num_pages]: each page's owners, at most 254; 255 for one that is free, but cached."""
    owners = np.minimum(stats.page_owners, MOST)
    return np.where(stats.page_cached & (owners == 0), np.uint8(CACHED), owners)


def packed(pages: npt.NDArray[np.uint8]) -> str:
    """Thousands of pages are mostly runs of alike ones: compressed they are a few hundred bytes."""
    return base64.b64encode(zlib.compress(pages.tobytes(), level=1)).decode()
