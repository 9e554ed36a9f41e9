"""The server from start to end."""

from __future__ import annotations

from pjax.errors import UnsupportedError
from pjax.server.config import ServerConfig


def serve(config: ServerConfig) -> int:
    """Serves until it is told to end; see `pjax.server.run`."""
    raise UnsupportedError(f"pjax can't serve {config.model!r} yet")
