"""Two hosts, processes on this machine: the tokens of one, an end that says why, and a start that names who differs.

`check_more.py` has four of them, and runs longer (make test-multi-host).
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from tests.hosts.conftest import SIZES
from tests.hosts.hosts import OPTIONS, ROOT, Hosts, free_port, worker
from tests.tiny import write_model

LIMIT = 10.0  # seconds in which all hosts end when one is lost


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Tokens and log-probabilities of a crowd that was preempted and found prefixes; nothing was compiled on the way."""
    assert found["tokens"] == expected["tokens"]

    def flat(scores: Any) -> list[float]:
        return [number for one in scores for number in flat(one)] if isinstance(scores, list) else [float(scores)]

    np.testing.assert_allclose(flat(found["logprobs"]), flat(expected["logprobs"]), atol=1e-4)
    assert found["preemptions"] > 0 and found["cached"] > 0 and found["compiled"] == 0, found
    assert 0 < found["largest_message"] < 4096


def crowd_of(hosts: Hosts) -> dict[str, Any]:
    """What rank 0 printed; every host has ended well, and compiled nothing after the warm-up."""
    assert hosts.wait() == [0] * hosts.size
    for rank in range(1, hosts.size):
        assert "0 programs compiled meanwhile" in hosts.err(rank)
        assert not hosts.out(rank).replace("[Gloo]", "").strip().startswith("{"), "a follower answers nobody"
    [line] = [line for line in hosts.out(0).splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.extended
def test_two_processes_give_the_tokens_of_one(folder: Path, options: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    with worker("crowd", folder, 2, tmp_path, **options) as hosts:
        found = crowd_of(hosts)
    same(found, expected)
    assert found["saved"] > 0 and found["restored"] > 0, "each host keeps its own part of the pages that leave the pool"


def check_loss(hosts: Hosts, lost: int, began: float, reason: str) -> None:
    """All other hosts have ended in time, with status 1, and their last line says why."""
    others = [rank for rank in range(hosts.size) if rank != lost]
    assert hosts.wait(others, LIMIT) == [1] * len(others)
    assert time.monotonic() - began < LIMIT
    for rank in others:
        last = hosts.err(rank).splitlines()[-1]
        assert last.startswith(f"pjax: rank {rank} of {hosts.size} ends: rank {lost} at ") and reason in last, last


def check_sigterm(hosts: Hosts, told: int) -> None:
    """Whichever host is told to end, rank 0 ends as a program that got the signal, and the others well."""
    hosts.signal(told, signal.SIGTERM)
    assert hosts.wait() == [128 + signal.SIGTERM, *[0] * (hosts.size - 1)]
    assert "Traceback" not in hosts.err(1) and "rank 1 ends with rank 0" in hosts.err(1)


@pytest.mark.extended
def test_a_killed_host_ends_the_other_and_a_restart_works(folder: Path, small: dict[str, Any], tmp_path: Path) -> None:
    port = free_port()
    for lost in (1, 0):  # the second time at the same port, at once
        with worker("load", folder, 2, tmp_path / str(lost), port=port, **small) as hosts:
            hosts.wait_for("generated")
            check_loss(hosts, lost, hosts.signal(lost, signal.SIGKILL), "is lost: its connection broke")


@pytest.mark.extended
def test_sigterm_of_a_follower_ends_all_in_order(folder: Path, small: dict[str, Any], tmp_path: Path) -> None:
    """Rank 0's is tested with the server, below, and in check_more.py."""
    with worker("load", folder, 2, tmp_path, **small) as hosts:
        hosts.wait_for("generated")
        check_sigterm(hosts, 1)


def test_a_step_that_fails_on_one_host_ends_all(folder: Path, small: dict[str, Any], tmp_path: Path) -> None:
    with worker("fail", folder, 2, tmp_path, **small) as hosts:
        assert hosts.wait() == [1, 1]
        for rank in range(2):
            assert "rank 0 failed: ZeroDivisionError: division by zero" in hosts.err(rank)


@pytest.mark.parametrize(
    ("changes", "other", "messages"),
    [
        ({"max_num_seqs": 4}, {"max_num_seqs": 3}, ["rank 1 has max_num_seqs 3, rank 0 has 4"]),
        ({"nnodes": 3, "start_timeout": 2}, {"start_timeout": 20}, ["nnodes is 3, but rank 2 has not come to 127.0.0.1:", "in 2 seconds"]),
        pytest.param({"nnodes": 3}, {"nnodes": 2}, ["rank 1 at", "has nnodes 2, rank 0 has 3"], marks=pytest.mark.extended),
        pytest.param(
            {"tensor_parallel_size": 6},
            {},
            ["tensor_parallel_size is 6, but 2 hosts have 2 devices, 1 each (cpu)"],
            marks=pytest.mark.extended,
        ),
        pytest.param(
            {"tensor_parallel_size": 3},
            {},
            ["tensor_parallel_size is 3, but must be a multiple of nnodes, 2"],
            marks=pytest.mark.extended,
        ),
    ],
)
def test_what_is_wrong_is_told_by_every_host(
    folder: Path, tmp_path: Path, changes: dict[str, Any], other: dict[str, Any], messages: list[str]
) -> None:
    with worker("crowd", folder, 2, tmp_path, each={1: other}, **changes) as hosts:
        statuses = hosts.wait(seconds=60)
        assert 0 not in statuses
        for rank in range(2):
            assert all(message in hosts.err(rank) for message in messages), hosts.err(rank)


@pytest.mark.parametrize("what", ["checkpoint", *(pytest.param(what, marks=pytest.mark.extended) for what in ("sources", "devices"))])
def test_hosts_that_are_not_alike_are_refused(folder: Path, tmp_path: Path, what: str) -> None:
    models, trees, devices = [folder, folder], [ROOT, ROOT], [1, 1]
    if what == "checkpoint":
        models[1] = write_model(tmp_path / "other", tokenizer=False, seed=1, **SIZES)
    elif what == "sources":
        shutil.copytree(ROOT / "pjax", tmp_path / "tree" / "pjax", ignore=shutil.ignore_patterns("__pycache__"))
        (tmp_path / "tree" / "pjax" / "more.py").write_text("# another version")
        trees[1] = tmp_path / "tree"
    else:
        devices[1] = 2
    port = free_port()

    def command(rank: int) -> list[str]:
        own = OPTIONS | {"nnodes": 2, "tensor_parallel_size": 2, "master_addr": "127.0.0.1", "master_port": port, "node_rank": rank}
        code = f"import sys; sys.path.insert(0, {str(trees[rank])!r}); from pjax import LLM; LLM({str(models[rank])!r}, "
        return ["-c", f"{code}skip_tokenizer_init=True, **{own!r})"]

    expected = {
        "checkpoint": "hosts disagree: rank 1 has file model.safetensors of ",
        "sources": "hosts disagree: rank 1 has pjax's sources ",
        "devices": "hosts disagree: rank 1 has number of devices 2, rank 0 has 1",
    }
    with Hosts(command, 2, tmp_path / "logs", devices) as hosts:
        assert 0 not in hosts.wait(seconds=60)
        for rank in range(2):
            assert expected[what] in hosts.err(rank)


@pytest.mark.extended
def test_a_server_over_two_hosts(options: dict[str, Any], tmp_path: Path) -> None:
    """Rank 0 answers; the other has no port of its own; SIGTERM ends both in order."""
    model = write_model(tmp_path / "model", num_hidden_layers=1)
    ports = free_port(), free_port()
    flags = {"max_model_len": 40, "max_num_seqs": 1, "max_num_batched_tokens": 16, "num_pages": 40, "port": ports[0], "nnodes": 2}
    flags |= {"tensor_parallel_size": 2, "master_addr": "127.0.0.1", "master_port": ports[1]} | options

    def command(rank: int) -> list[str]:
        named = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return ["-m", "pjax", "serve", str(model), *named, "--node-rank", str(rank), "--preemption-mode", "recompute", "--lazy"]

    url = f"http://127.0.0.1:{ports[0]}"
    with Hosts(command, 2, tmp_path / "logs") as hosts:
        hosts.wait_until_ready(url)
        body = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        answers = [httpx2.post(f"{url}/v1/completions", json=body, timeout=120).json() for _ in range(2)]
        texts = {answer["choices"][0]["text"] for answer in answers}
        hosts.signal(0, signal.SIGTERM)
        assert hosts.wait() == [0, 0]
    assert len(texts) == 1 and texts.pop(), "the tokens are compared above, and in check_more.py"
