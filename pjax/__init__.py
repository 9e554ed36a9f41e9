"""pjax: high-throughput LLM inference in pure JAX. Importing it is cheap; names load what they need."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pjax.engine import AsyncLLM as AsyncLLM
    from pjax.engine import LLMEngine as LLMEngine
    from pjax.errors import CheckpointError as CheckpointError
    from pjax.errors import ConfigError as ConfigError
    from pjax.errors import EngineDeadError as EngineDeadError
    from pjax.errors import InvalidRequestError as InvalidRequestError
    from pjax.errors import PjaxError as PjaxError
    from pjax.errors import QueueFullError as QueueFullError
    from pjax.errors import RequestFailedError as RequestFailedError
    from pjax.errors import UnsupportedError as UnsupportedError
    from pjax.llm import LLM as LLM
    from pjax.outputs import BeamSearchOutput as BeamSearchOutput
    from pjax.outputs import CompletionOutput as CompletionOutput
    from pjax.outputs import Logprob as Logprob
    from pjax.outputs import RequestOutput as RequestOutput
    from pjax.params import BeamSearchParams as BeamSearchParams
    from pjax.params import SamplingParams as SamplingParams

__version__ = "0.2.0"

_HOME = {
    "LLM": "pjax.llm",
    "LLMEngine": "pjax.engine",
    "AsyncLLM": "pjax.engine",
    "SamplingParams": "pjax.params",
    "BeamSearchParams": "pjax.params",
    "BeamSearchOutput": "pjax.outputs",
    "RequestOutput": "pjax.outputs",
    "CompletionOutput": "pjax.outputs",
    "Logprob": "pjax.outputs",
    "PjaxError": "pjax.errors",
    "ConfigError": "pjax.errors",
    "InvalidRequestError": "pjax.errors",
    "QueueFullError": "pjax.errors",
    "RequestFailedError": "pjax.errors",
    "EngineDeadError": "pjax.errors",
    "CheckpointError": "pjax.errors",
    "UnsupportedError": "pjax.errors",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "EngineDeadError",
    "InvalidRequestError",
    "LLMEngine",
    "Logprob",
    "PjaxError",
    "QueueFullError",
    "RequestFailedError",
    "RequestOutput",
    "SamplingParams",
    "UnsupportedError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
