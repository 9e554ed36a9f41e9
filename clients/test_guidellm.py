"""GuideLLM, a load generator for vLLM's servers; in an environment of its own, as its pins and lm-eval's do not agree."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer

HERE = Path(__file__).parent
GUIDELLM = os.environ.get("CLIENTS_GUIDELLM", str(HERE.parent / ".venv-guidellm" / "bin" / "guidellm"))


@pytest.mark.parametrize("kind", ["text_completions", "chat_completions"])
def test_benchmark(kind: str, served: dict[str, str], tmp_path: Path) -> None:
    """Every request of four concurrent streams is answered, with as many tokens as were asked for and times that make sense."""
    report = tmp_path / "report.json"
    command = [GUIDELLM, "benchmark", "run", "--target", served["url"], "--rate-type", "concurrent", "--rate", "4"]
    command += ["--max-requests", "20", "--data", "prompt_tokens=16,output_tokens=8", "--processor", served["folder"]]
    command += ["--output-path", str(report), "--disable-progress", "--disable-console-outputs"]
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "GUIDELLM__OPENAI__API_KEY": served["key"],
        "GUIDELLM__PREFERRED_ROUTE": kind,
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    benchmark = json.loads(report.read_text())["benchmarks"][0]
    assert benchmark["run_stats"]["requests_made"] == {"successful": 20, "errored": 0, "incomplete": 0, "total": 20}
    tokenizer = Tokenizer.from_file(f"{served['folder']}/tokenizer.json")
    for request in benchmark["requests"]["successful"]:
        assert request["request_type"] == kind
        sent = len(tokenizer.encode(request["prompt"]).ids)  # 16, or 15 where GuideLLM began with a special token, which it then drops
        assert sent >= 15 and request["output_tokens"] == 8
        assert request["prompt_tokens"] == sent if kind == "text_completions" else request["prompt_tokens"] >= sent
        assert request["start_time"] < request["first_token_time"] <= request["last_token_time"] <= request["end_time"]
