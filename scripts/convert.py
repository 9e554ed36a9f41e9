"""The same as `pjax convert`."""

from __future__ import annotations

import sys

from pjax.cli import entry

if __name__ == "__main__":
    entry(["convert", *sys.argv[1:]])
