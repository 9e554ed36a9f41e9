"""Requests in, outputs out: the engine holds scheduler, runner and text together."""

from pjax.engine.async_llm import AsyncLLM as AsyncLLM
from pjax.engine.engine import LLMEngine as LLMEngine
from pjax.engine.intake import Prompt as Prompt
from pjax.engine.replicas import Replicas as Replicas
from pjax.engine.stats import EngineStats as EngineStats
from pjax.engine.stats import StepStats as StepStats
