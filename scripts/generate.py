"""The same as `pjax generate`."""

from __future__ import annotations

import sys

from pjax.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
