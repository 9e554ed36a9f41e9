"""Real processes on this machine, each a host of one instance."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2

from tests.server.common import wait_for

ROOT = Path(__file__).resolve().parents[2]
# Compiling is most of the time here, so without the compiler's optimisations.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
OPTIONS: dict[str, Any] = {
    "max_model_len": 40, "max_num_seqs": 2, "max_num_batched_tokens": 16, "page_size": 4, "num_pages": 10,
    "preemption_mode": "swap", "start_timeout": 60,
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Hosts:
    """Processes of one instance; whatever is left of them is killed at the end.

    Args:
      command: what each runs, given its rank.
      devices: CPU devices of each, or of every one.
    """

    def __init__(self, command: Callable[[int], Sequence[str]], size: int, folder: Path, devices: int | Sequence[int] = 1) -> None:
        self.size, self.folder = size, folder
        folder.mkdir(parents=True, exist_ok=True)
        counts = [devices] * size if isinstance(devices, int) else devices
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(size):
            env["XLA_FLAGS"] = f"{FLAGS} --xla_force_host_platform_device_count={counts[rank]}"
            with (folder / f"out{rank}").open("wb") as out, (folder / f"err{rank}").open("wb") as err:
                self.processes.append(subprocess.Popen([sys.executable, *command(rank)], stdout=out, stderr=err, env=env, cwd=ROOT))

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        if error is not None:
            for rank in range(self.size):
                print(f"---- rank {rank}: {self.processes[rank].returncode}\n{self.out(rank)[-500:]}\n{self.err(rank)[-3000:]}")

    def out(self, rank: int) -> str:
        return (self.folder / f"out{rank}").read_text(errors="replace")

    def err(self, rank: int) -> str:
        return (self.folder / f"err{rank}").read_text(errors="replace")

    def wait_for(self, text: str, rank: int = 0, seconds: float = 240) -> None:
        """Until a rank has printed it."""
        until = time.monotonic() + seconds
        while text not in self.out(rank):
            assert time.monotonic() < until, f"rank {rank} has not printed {text!r} in {seconds:g} s"
            assert all(process.poll() is None for process in self.processes), "a host has ended"
            time.sleep(0.05)

    def wait(self, ranks: Sequence[int] | None = None, seconds: float = 240) -> list[int]:
        """The exit statuses of ranks, all by default."""
        until = time.monotonic() + seconds
        return [self.processes[rank].wait(max(until - time.monotonic(), 0.01)) for rank in (range(self.size) if ranks is None else ranks)]

    def wait_until_ready(self, url: str) -> None:
        """Until the server of rank 0 says so; all must live until then."""

        def is_ready() -> bool:
            assert [process.poll() for process in self.processes] == [None] * self.size
            try:
                return httpx2.get(f"{url}/ready").status_code == 200
            except httpx2.TransportError:
                return False

        wait_for(is_ready, 120)

    def signal(self, rank: int, number: signal.Signals) -> float:
        """Sends it; the time."""
        self.processes[rank].send_signal(number)
        return time.monotonic()


def worker(
    what: str,
    model: Path,
    size: int,
    folder: Path,
    *,
    devices: int = 1,
    port: int | None = None,
    each: Mapping[int, Mapping[str, Any]] | None = None,
    **changes: Any,
) -> Hosts:
    """Hosts of `worker.py`.

    Args:
      each: options that one rank has otherwise.
    """
    options = OPTIONS | {"nnodes": size, "tensor_parallel_size": size * devices, "master_addr": "127.0.0.1"} | changes
    options["master_port"] = port or free_port()

    def command(rank: int) -> list[str]:
        own = options | {"node_rank": rank} | dict((each or {}).get(rank, {}))
        return ["-m", "tests.hosts.worker", what, str(model), json.dumps(own)]

    return Hosts(command, size, folder, devices)
