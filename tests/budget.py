"""How long tests with random inputs look: `make test-all` sets PJAX_TESTS=all, and they look ten times as long."""

from __future__ import annotations

import os

IS_THOROUGH = os.environ.get("PJAX_TESTS") == "all"


def examples(usual: int) -> int:
    """Returns the number of examples for this run, where `usual` are enough for `make test`."""
    return usual * 10 if IS_THOROUGH else usual
