"""The OpenAI-compatible server. Importing this loads neither FastAPI nor JAX; `run` does."""

from __future__ import annotations

from pjax.server.server_config import ServerConfig as ServerConfig


def run(config: ServerConfig) -> int:
    """Serves until SIGTERM or Ctrl-C and drains; the exit status, 0 unless the engine died.

    Where a step hangs, or a program is being compiled, in the end, this does not return: it ends the process with that status.

    Raises ConfigError, CheckpointError or UnsupportedError when the model or a setting is wrong, before the port is taken.
    """
    from pjax.server.lifecycle import serve

    return serve(config)
