"""docs/serving.md tells every flag, endpoint and metric that there is, and the board asks for no other."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from pathlib import Path
from typing import Any

from pjax.cli.common import NO_FLAG
from pjax.config import EngineConfig
from pjax.server import ServerConfig

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_board_asks_only_for_metrics_that_there_are() -> None:
    script = load("check_docker")
    assert len(script.expressions()) > 20
    assert script.unknown_metrics() == {}


def test_the_document_is_current() -> None:
    script = load("write_serving_docs")
    text = script.DOCUMENT.read_text(encoding="utf-8")
    assert script.written(text) == text, "run python scripts/write_serving_docs.py"
    named = {"api_keys": "api_key", "allowed_origins": "allowed_origin"}
    for item in (*fields(ServerConfig), *fields(EngineConfig)):
        if item.name not in ("engine", *NO_FLAG):
            assert f"`--{named.get(item.name, item.name).replace('_', '-')}`" in text
    for name in ("POST /v1/chat/completions", "GET /engine/state", "vllm:num_requests_running", "vllm:prefix_cache_hits_total"):
        assert f"`{name}`" in text
