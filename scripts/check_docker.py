"""Checks docker/: every metric that the board asks for is one that docs/serving.md names, and promtool takes every expression.

promtool, from Debian's package prometheus, also checks Prometheus' settings.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = re.compile(r"_(bucket|sum|count)$")


def expressions() -> dict[str, str]:
    """Every expression of the board, by its panel."""
    board = json.loads((ROOT / "docker/grafana/dashboards/pjax.json").read_text(encoding="utf-8"))
    return {f"{panel['title']} {target['refId']}": target["expr"] for panel in board["panels"] for target in panel["targets"]}


def unknown_metrics() -> dict[str, set[str]]:
    """Panels that ask for metrics that there are not."""
    known = set(re.findall(r"`((?:vllm|pjax):\w+)`", (ROOT / "docs/serving.md").read_text(encoding="utf-8")))
    asked = {panel: set(re.findall(r"(?:vllm|pjax):\w+", text)) for panel, text in expressions().items()}
    wrong = {panel: {name for name in names if name not in known and SUFFIX.sub("", name) not in known} for panel, names in asked.items()}
    return {panel: names for panel, names in wrong.items() if names}


def promtool(*arguments: str) -> None:
    """Runs it, and ends when it finds something."""
    subprocess.run(["promtool", *arguments], check=True)


def main() -> None:
    """Checks everything."""
    if wrong := unknown_metrics():
        sys.exit(f"the board asks for metrics that there are not: {wrong}")
    promtool("check", "config", str(ROOT / "docker/prometheus.yml"))
    rules = [
        {"record": f"board:{index}", "expr": text.replace("$__rate_interval", "1m").replace("$model", ".*")}
        for index, text in enumerate(expressions().values())
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:  # JSON is YAML
        json.dump({"groups": [{"name": "board", "rules": rules}]}, file)
        file.flush()
        promtool("check", "rules", file.name)


if __name__ == "__main__":
    main()
