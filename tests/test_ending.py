"""How a command's process ends: in time and with its own status, whatever its threads still do."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pjax import cli

def main(arguments):
    ThreadPoolExecutor().submit(time.sleep, 3600)
    print("all is said", end="")
    {end}

cli.main, cli.EXIT_SECONDS = main, 0.2
cli.entry([])
"""


@pytest.mark.parametrize(
    ("end", "status", "last"),
    [
        ("return 0", 0, ""),
        ("return 7", 7, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('no model')", 1, "no model"),
        ("raise KeyError('x')", 1, "KeyError: 'x'"),
    ],
)
def test_a_command_ends_though_a_thread_does_not(end: str, status: int, last: str) -> None:
    done = subprocess.run([sys.executable, "-c", CODE.format(end=end)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "all is said")
    assert done.stderr.splitlines()[-1:] == ([last] if last else [])
