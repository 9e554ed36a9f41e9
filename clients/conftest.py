"""The servers that the clients talk to run in another environment, that of PJAX_PYTHON: a client needs nothing of pjax."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PYTHON = str(Path(os.environ.get("PJAX_PYTHON", HERE.parent / ".venv" / "bin" / "python")).absolute())


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """url, tools_url, key, model, folder."""
    folder = tmp_path_factory.mktemp("served")
    command = [PYTHON, str(HERE / "serve.py"), str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        line = server.stdout.readline()
        assert line, "the server did not start"
        yield json.loads(line)
        server.stdin.close()
        assert server.wait(60) == 0


@pytest.fixture(scope="session")
def reference(served: dict[str, str]) -> Any:
    """transformers' log-likelihood of continuations."""

    def scores(pairs: list[tuple[list[int], list[int]]]) -> list[list[Any]]:
        command = [PYTHON, str(HERE / "reference.py"), served["folder"]]
        done = subprocess.run(command, input=json.dumps(pairs), capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    return scores
