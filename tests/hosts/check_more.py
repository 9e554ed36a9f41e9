"""More and longer: four processes, two of two devices each, the middle one lost, a server that loses a host under load.

Runs with make test-multi-host.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.hosts.hosts import Hosts, free_port, worker
from tests.hosts.test_processes import LIMIT, check_loss, check_sigterm, crowd_of, same
from tests.server.common import wait_for
from tests.tiny import write_model


@pytest.mark.parametrize(("size", "devices"), [(4, 1), (2, 2)])
def test_the_tokens_of_one_process(
    folder: Path,
    options: dict[str, Any],
    expected: dict[str, Any],
    tmp_path: Path,
    size: int,
    devices: int,
) -> None:
    with worker("crowd", folder, size, tmp_path, devices=devices, **options) as hosts:
        same(crowd_of(hosts), expected)


@pytest.mark.parametrize("changes", [{"async_scheduling": False}, {"preemption_mode": "recompute"}, {"enable_prefix_caching": False}])
def test_other_ways_of_scheduling(
    folder: Path,
    options: dict[str, Any],
    expected: dict[str, Any],
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    with worker("crowd", folder, 2, tmp_path, **options | changes) as hosts:
        found = crowd_of(hosts)
    assert found["tokens"] == expected["tokens"] and found["compiled"] == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", range(4))
def test_any_of_four_is_lost(folder: Path, small: dict[str, Any], tmp_path: Path, lost: int, number: signal.Signals) -> None:
    """All others say which, whatever their steps failed of meanwhile."""
    with worker("load", folder, 4, tmp_path, **small) as hosts:
        hosts.wait_for("generated")
        reason = "its connection broke" if number == signal.SIGKILL else "it has said nothing for 6 seconds"
        check_loss(hosts, lost, hosts.signal(lost, number), f"is lost: {reason}")


def test_a_stopped_host_ends_the_other(folder: Path, small: dict[str, Any], tmp_path: Path) -> None:
    """As one that has lost its power: no connection is closed. It ends by itself when it goes on."""
    with worker("load", folder, 2, tmp_path, **small) as hosts:
        hosts.wait_for("generated")
        check_loss(hosts, 1, hosts.signal(1, signal.SIGSTOP), "is lost: it has said nothing for 6 seconds")
        hosts.signal(1, signal.SIGCONT)
        assert hosts.wait([1], LIMIT) == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_rank_0_end_all_in_order(folder: Path, small: dict[str, Any], tmp_path: Path, number: signal.Signals) -> None:
    with worker("load", folder, 2, tmp_path, **small) as hosts:
        hosts.wait_for("generated")
        if number == signal.SIGTERM:
            check_sigterm(hosts, 0)
        else:
            hosts.signal(0, number)
            status, other = hosts.wait()
            assert status != 0 and other == 0 and "KeyboardInterrupt" in hosts.err(0)


def test_a_server_that_loses_a_host_tells_its_clients(options: dict[str, Any], tmp_path: Path) -> None:
    """Streams that run get an error, /health stops answering 200, and the process ends with status 1: a supervisor starts all anew."""
    model = write_model(tmp_path / "model", num_hidden_layers=1)
    ports = free_port(), free_port()

    def command(rank: int) -> list[str]:
        flags = f"--max-model-len 200 --max-num-seqs 2 --max-num-batched-tokens 16 --num-pages 80 --port {ports[0]} --nnodes 2 "
        flags += f"--tensor-parallel-size 2 --master-addr 127.0.0.1 --master-port {ports[1]} --node-rank {rank} --lazy "
        return ["-m", "pjax", "serve", str(model), *flags.split(), "--compilation-cache-dir", options["compilation_cache_dir"]]

    url = f"http://127.0.0.1:{ports[0]}"
    for _ in range(2):  # a restart at the same ports works
        with Hosts(command, 2, tmp_path / "logs") as hosts:
            hosts.wait_until_ready(url)
            lines: list[list[str]] = [[], []]

            def stream(found: list[str]) -> None:
                body = {"prompt": "abc", "max_tokens": 190, "temperature": 0, "ignore_eos": True, "stream": True}
                while not any("error" in line for line in found):  # until the server is gone
                    with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
                        found.extend(response.iter_lines())

            threads = [threading.Thread(target=stream, args=(found,)) for found in lines]
            for thread in threads:
                thread.start()
            wait_for(lambda lines=lines: all(len(found) > 400 for found in lines), 120)
            began = hosts.signal(1, signal.SIGKILL)
            assert hosts.wait([0], LIMIT) == [1] and time.monotonic() - began < LIMIT
            for thread in threads:
                thread.join(20)
            errors = [json.loads(line[6:]) for found in lines for line in found if line.startswith('data: {"error"')]
            assert len(errors) == 2, [found[-2:] for found in lines]
            assert "rank 1 at " in hosts.err(0).splitlines()[-1]
