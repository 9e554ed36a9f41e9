"""Two servers for the clients, run with pjax's own Python: a made-up checkpoint, and an engine that says what it is told to.

Prints one line of JSON with their addresses and ends when its standard input does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pjax import AsyncLLM  # noqa: E402
from tests.server.common import OPTIONS, ScriptedLLM, start  # noqa: E402
from tests.tiny import write_model  # noqa: E402

TOOL_TEMPLATE = (
    "{# <tool_call> #}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
CALL = 'Let me see.<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
KEY = "test-key"


def main(folder: Path) -> None:
    write_model(folder / "model")
    llm = AsyncLLM(folder / "model", **OPTIONS)
    scripted = ScriptedLLM(folder / "scripted", CALL, template=TOOL_TEMPLATE)
    with start(llm, folder / "model", api_keys=[KEY]) as served, start(scripted, api_keys=[KEY]) as tools:
        print(
            json.dumps({"url": served.url, "tools_url": tools.url, "key": KEY, "model": "tiny", "folder": str(folder / "model")}),
            flush=True,
        )
        sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
