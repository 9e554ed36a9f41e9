"""Schemathesis on the server's own OpenAPI: right and wrong requests by the thousand, and never a status of 5xx."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CASES = 2000


def test_no_5xx_and_errors_as_the_schema_says(served: dict[str, str], tmp_path: Path) -> None:
    command = [
        *(
            Path(sys.executable).with_name("schemathesis"),
            "run",
            f"{served['url']}/openapi.json",
            "--header",
            f"Authorization: Bearer {served['key']}",
        ),
        *("--max-examples", "420", "--seed", "1", "--phases", "examples,fuzzing", "--generation-database", "none"),
        *("--checks", "not_a_server_error,response_schema_conformance,content_type_conformance", "--request-timeout", "60", "--no-color"),
        *("--max-failures", "5", "--suppress-health-check", "all"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=590)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-8000:]
    found = re.search(r"(\d+) generated", said)
    assert found is not None and int(found.group(1)) >= CASES, said[-2000:]
