"""Requests in, outputs out: the engine holds scheduler, runner and text together. What serves threads is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pjax.engine.engine import LLMEngine as LLMEngine
from pjax.engine.intake import Prompt as Prompt
from pjax.engine.stats import EngineStats as EngineStats
from pjax.engine.stats import StepStats as StepStats

if TYPE_CHECKING:
    from pjax.engine.async_llm import AsyncLLM as AsyncLLM
    from pjax.engine.replicas import Replicas as Replicas

_HOME = {"AsyncLLM": "pjax.engine.async_llm", "Replicas": "pjax.engine.replicas"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pjax.engine' has no attribute {name!r}")
