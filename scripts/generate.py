"""The same as `pjax generate`."""

from __future__ import annotations

import sys

from pjax.cli import entry

if __name__ == "__main__":
    entry(["generate", *sys.argv[1:]])
