"""A real Ray cluster on this machine, for `make test-ray`: its own environment has Ray, which the project's has not."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports jax; replicas inherit it
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import httpx2
import psutil
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from pjax import LLM
from tests.tiny import write_model

OPTIONS: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "num_pages": 64,
    "lazy": True,
}


@dataclass(frozen=True)
class Cluster:
    """Ray's proxy, and what it stands in front of."""

    url: str
    folder: Path
    arguments: dict[str, Any]

    def replicas(self) -> list[psutil.Process]:
        """Processes of replicas, by the name that Ray gives them; this session's only."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::ServeReplica"):
                    found.append(process)
            except psutil.Error:
                pass  # it has just ended
        return found

    def metrics(self) -> tuple[str, dict[str, float]]:
        """The id of whichever replica answers, and its samples; those with a state or the like have it behind a dot."""
        response = httpx2.get(f"{self.url}/metrics", timeout=60)
        response.raise_for_status()
        found: dict[str, float] = {}
        replica = ""
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                replica = sample.labels.get("engine", replica)
                rest = [value for name, value in sorted(sample.labels.items()) if name not in ("model_name", "engine")]
                found[".".join([sample.name, *rest])] = sample.value
        return replica, found

    def all_metrics(self, count: int = 2) -> dict[str, dict[str, float]]:
        """Every replica's newest samples by its id."""
        found: dict[str, dict[str, float]] = {}
        until = time.monotonic() + 120
        while len(found) < count:
            assert time.monotonic() < until, f"only {sorted(found)} answer"
            replica, samples = self.metrics()
            found[replica] = samples
        return found

    def idle(self, count: int = 2) -> bool:
        """Whether nothing runs or waits in any replica, and all their pages are free."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "pjax:pages.used")
        return not any(samples[name] for samples in self.all_metrics(count).values() for name in names)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Until something holds; AssertionError when it never does."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came to hold"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def llm(folder: Path) -> LLM:
    """What all answers are compared with."""
    return LLM(folder, progress=False, **OPTIONS)


@pytest.fixture(scope="session")
def cluster(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Ray without an application yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        cache = str(tmp_path_factory.mktemp("compiled"))  # what one replica compiles, the next one reads
        arguments = {"model": str(folder), "served_model_name": "tiny", "compilation_cache_dir": cache, **OPTIONS}
        yield Cluster(f"http://127.0.0.1:{port}", folder, arguments)
        serve.shutdown()
    finally:
        ray.shutdown()
