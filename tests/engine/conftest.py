"""A made-up checkpoint for each module, and an engine on it with the module's own OPTIONS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pjax import LLM, AsyncLLM
from tests.engine.common import greedy, ids
from tests.tiny import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path, request: pytest.FixtureRequest) -> LLM:
    return LLM(folder, **request.module.OPTIONS)


@pytest.fixture(scope="module")
def expected(llm: LLM, request: pytest.FixtureRequest) -> list[list[int]]:
    """Ten greedy tokens for each of the module's own PROMPTS."""
    return [ids(llm, prompt, greedy(10)) for prompt in request.module.PROMPTS]


@pytest.fixture
def served(folder: Path, request: pytest.FixtureRequest) -> Iterator[AsyncLLM]:
    """The engine in a thread, which ends with the test."""
    llm = AsyncLLM(folder, **request.module.OPTIONS)
    yield llm
    llm.close()
    assert llm.has_ended
