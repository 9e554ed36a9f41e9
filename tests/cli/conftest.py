"""The made-up model that commands run, and an engine to compare them with."""

from __future__ import annotations

from pathlib import Path

import pytest

from pjax import LLM
from tests.server.common import OPTIONS
from tests.tiny import write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def llm(model: Path) -> LLM:
    return LLM(model, **OPTIONS)
