"""The demo model's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from pjax.text.loading import load_tokenizer
from pjax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def demo(demo_gguf: Path) -> Tokenizer:
    return load_tokenizer(demo_gguf)
