"""Writes the tables of docs/serving.md: flags from the command line's parser, endpoints from the OpenAPI, metrics from the registry."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pjax import cli
from pjax.config import EngineConfig
from pjax.engine import EngineStats
from pjax.server import ServerConfig
from pjax.server.app import create_app

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "serving.md"


class Idle:
    """An engine without a model, with figures of zero: enough to build the application."""

    error = None
    is_running = True

    def __init__(self) -> None:
        tokenizer = SimpleNamespace(chat_template=None, eos_token_id=None)
        self.engine = SimpleNamespace(tokenizer=tokenizer, max_model_len=1, config=EngineConfig(), model_config=None, on_step=None)

    def stats(self) -> EngineStats:
        """Nothing runs."""
        arrays = {"page_owners": np.zeros(1, np.uint8), "page_cached": np.zeros(1, bool)}
        return EngineStats(**dict.fromkeys(EngineStats.__dataclass_fields__, 0) | arrays | {"num_pages": 1})


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)


def flags() -> str:
    """Every flag of `pjax serve`, by group."""
    parser: argparse.ArgumentParser = cli.parser("serve").parse_args(["serve", "m"]).parser
    parts = []
    for group in parser._action_groups:
        listed = [action for action in group._group_actions if action.option_strings and action.dest != "help"]
        if not listed:
            continue
        rows = []
        for action in listed:
            text, _, default = (action.help or "").replace("%%", "%").partition(" (default: ")
            text = text if default else (action.help or "").replace("%%", "%")
            if text.startswith("(default: "):
                text, default = "", text.removeprefix("(default: ")
            rows.append([f"`{action.option_strings[0]}`", text, f"`{default[:-1]}`" if default[:-1] else ""])
        parts.append(f"**{group.title or 'options'}**\n\n{table(('flag', '', 'default'), rows)}")
    return "\n\n".join(parts)


def endpoints(app: Any) -> str:
    """Every path that the application answers."""
    rows = [
        [f"`{method.upper()} {path}`", str(operation.get("description") or operation.get("summary", ""))]
        for path, operations in app.openapi()["paths"].items()
        for method, operation in operations.items()
    ]
    return table(("endpoint", ""), rows)


def metrics(app: Any) -> str:
    """Every family of /metrics."""
    families = sorted(app.state.service.metrics.registry.collect(), key=lambda family: (family.name.startswith("pjax"), family.name))
    names = [family.name + ("_total" if family.type == "counter" else "") for family in families]
    rows = [[f"`{name}`", family.type, family.documentation] for name, family in zip(names, families, strict=True)]
    return table(("metric", "type", ""), rows)


def written(text: str) -> str:
    """The document with its tables made anew."""
    app = create_app(Idle(), ServerConfig(model="m"))  # type: ignore[arg-type]
    for name, part in {"flags": flags(), "endpoints": endpoints(app), "metrics": metrics(app)}.items():
        pattern = re.compile(rf"(<!-- {name}: .*? -->\n).*?(\n<!-- end of {name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda found, part=part: f"{found[1]}\n{part}\n{found[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{DOCUMENT} has {count} places for {name}, but must have one")
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
