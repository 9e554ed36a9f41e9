"""These tests need Chromium, and an environment of their own with selenium: `make test-page` runs them.

The server runs in the project's own environment, whose Python PJAX_SERVER_PYTHON names.
"""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("selenium") else ["test_*.py"]
