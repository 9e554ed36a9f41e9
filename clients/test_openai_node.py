"""OpenAI's package for Node."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def test_node(served: dict[str, str]) -> None:
    env = os.environ | {"BASE_URL": served["url"], "TOOLS_URL": served["tools_url"], "API_KEY": served["key"]}
    modules = Path(os.environ.get("CLIENTS_NODE", HERE.parent / ".venv-clients" / "node"))
    script = modules / "openai_node.mjs"  # beside node_modules, where Node looks for packages
    script.write_text((HERE / "openai_node.mjs").read_text())
    done = subprocess.run(["node", str(script)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ok"
