"""A small model, what one process makes of it, and a cache of compiled steps for all processes of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pjax import LLM
from tests.hosts.hosts import OPTIONS
from tests.hosts.worker import crowd
from tests.tiny import write_model

SIZES: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), tokenizer=False, **SIZES)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is compiled once is there for all tests of this file."""
    return {"compilation_cache_dir": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def small(options: dict[str, Any]) -> dict[str, Any]:
    """Few steps to compile."""
    return options | {"lazy": True, "max_num_seqs": 1, "preemption_mode": "recompute"}


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    """On one device, with room for all and without prefix caching."""
    sizes = {name: value for name, value in OPTIONS.items() if name != "start_timeout"}
    sizes |= {"num_pages": 200, "enable_prefix_caching": False, "preemption_mode": "recompute", "lazy": True}
    found = crowd(LLM(folder, skip_tokenizer_init=True, progress=False, **sizes))
    assert found["preemptions"] == found["cached"] == 0
    return found
