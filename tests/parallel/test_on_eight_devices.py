"""Tensor parallelism on eight CPU devices.

JAX makes them when it starts, so each file `check_*.py` runs as a pytest of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Compiling is most of the time here, so without the compiler's optimisations.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
CHECKS = sorted(path.name for path in HERE.glob("check_*.py"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_devices(name: str) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", str(HERE / name)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=HERE.parents[1], env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
