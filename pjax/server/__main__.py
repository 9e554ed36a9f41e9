"""`python -m pjax.server --model MODEL` is `pjax serve --model MODEL`."""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["serve"]
    runpy.run_module("pjax", run_name="__main__", alter_sys=True)
