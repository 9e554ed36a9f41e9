"""Requests in, outputs out: the engine holds scheduler, runner and text together."""

from pjax.engine.engine import LLMEngine as LLMEngine
from pjax.engine.intake import Prompt as Prompt
