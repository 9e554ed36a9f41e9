"""The same as `pjax convert`."""

from __future__ import annotations

import sys

from pjax.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
