"""A made-up checkpoint for each module, and an engine on it with the module's own OPTIONS."""

from __future__ import annotations

from pathlib import Path

import pytest

from pjax import LLM
from tests.tiny import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path, request: pytest.FixtureRequest) -> LLM:
    return LLM(folder, **request.module.OPTIONS)
