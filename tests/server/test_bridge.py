"""Between HTTP and the engine: what has come is given before what went wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from pjax import RequestFailedError, SamplingParams
from pjax.outputs import RequestOutput
from pjax.server.bridge import Bridge
from pjax.server.metrics import ServerMetrics
from tests.server.common import ScriptedLLM


class FailingLLM(ScriptedLLM):
    """Fails after its outputs."""

    async def generate(self, *arguments: Any, **options: Any) -> AsyncGenerator[RequestOutput, None]:
        async for output in super().generate(*arguments, **options):
            if output.finished:
                raise RequestFailedError("the device is gone")
            yield output


def test_outputs_before_a_failure_are_not_lost(tmp_path: Path) -> None:
    llm: Any = FailingLLM(tmp_path, "abc")

    async def main() -> None:
        generation = Bridge(llm, ServerMetrics(llm, "m"), 60).start([[1]], SamplingParams(), "r", {})
        await asyncio.wait(generation._tasks, timeout=60)  # a reader that comes when all has happened
        index, output = await anext(generation)
        assert (index, output.outputs[0].text) == (0, "ab")
        with pytest.raises(RequestFailedError, match="the device is gone"):
            await anext(generation)
        await generation.close()

    asyncio.run(main())
