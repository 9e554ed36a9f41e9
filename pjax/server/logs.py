"""Logs of the server: a line for each request, one of throughput while it is busy, as text or as JSON objects."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from typing import Any

from pjax.engine import AsyncLLM, EngineStats

log = logging.getLogger("pjax.server")
INTERVAL = 10.0  # seconds between two lines of throughput


_CONTROL = re.compile(r"[^\n\t\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]|[\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the fields that a record carries."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        shown: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            shown["exception"] = self.formatException(record.exc_info)
        return json.dumps(shown)


class TextFormatter(logging.Formatter):
    """A line for people; the fields follow the message.

    Control characters are shown as escapes, and the lines of a traceback after its first are indented: whatever a message quotes, no line
    begins as an entry of the log does.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields = getattr(record, "fields", None)
        line = super().format(record)
        line = _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), line).replace("\n", "\n    ")
        return f"{line} {' '.join(f'{name}={quoted(value)}' for name, value in fields.items())}" if fields else line


def quoted(value: Any) -> str:
    """A value on one line: what a client sent can't begin a line of its own."""
    text = str(value)
    return text if text and all(c.isalnum() or c in "-_.:/,+" for c in text) and text.isascii() else json.dumps(text)


def set_up(level: str, form: str) -> None:
    """Shows the messages of pjax and uvicorn on standard error. An application that has set up logging keeps its own way."""
    if logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    for name in ("pjax", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())


def log_request(method: str, path: str, status: int, fields: dict[str, Any]) -> None:
    """One request's line."""
    log.info("%s %s %d", quoted(method), quoted(path), status, extra={"fields": fields})


async def log_throughput(llm: AsyncLLM, interval: float = INTERVAL) -> None:
    """A line every so many seconds while there is work."""
    before, then = llm.stats(), time.monotonic()
    while True:
        await asyncio.sleep(interval)
        after, now = llm.stats(), time.monotonic()
        if after.num_running or after.num_waiting or after.num_steps != before.num_steps:
            log.info("%s", throughput(before, after, now - then))
        before, then = after, now


def throughput(before: EngineStats, after: EngineStats, seconds: float) -> str:
    """What the engine did between two snapshots."""
    prompt = (after.prompt_tokens - before.prompt_tokens) / seconds
    generated = (after.generation_tokens - before.generation_tokens) / seconds
    queries = after.prefix_cache_queries - before.prefix_cache_queries
    hits = 100 * (after.prefix_cache_hits - before.prefix_cache_hits) / queries if queries else 0.0
    return (
        f"prompt {prompt:.1f} tok/s, generation {generated:.1f} tok/s, {after.num_running} running, {after.num_waiting} waiting, "
        f"pages {100 * after.kv_cache_usage:.1f}% used, prefix cache {hits:.1f}% hit"
    )
