"""These tests need the TPU and GPU compilers and an environment of their own: `make test-aot` runs them."""

import importlib.util
import os

collect_ignore_glob = [] if importlib.util.find_spec("libtpu") else ["test_*.py"]

os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no TPU to ask
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
