"""The parts of several hosts without their processes: places, messages, what is compared, links, and what a step sends."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from pjax.config import EngineConfig
from pjax.errors import ConfigError
from pjax.hosts import facts, group, link, place
from pjax.hosts.codec import decode, encode
from pjax.hosts.group import Group, disagreement
from pjax.hosts.join import _reach, join
from pjax.hosts.link import Link, secure
from pjax.params import LogitRules
from pjax.runner.batch import find_bucket, make_buckets, pack
from pjax.runner.mirror import Mirror, NewRow
from pjax.sampling.parameters import SamplingTable
from pjax.scheduler import Scheduler
from tests.hosts.hosts import free_port
from tests.scheduler.test_scheduler import make_request


def found(environment: dict[str, str], **options: Any) -> tuple[int, int, str]:
    one = place.find_place(EngineConfig(nnodes=4, **options), environment)
    assert one is not None
    return one.rank, one.size, one.leader


def test_the_place_comes_from_flags_or_from_what_started_the_process() -> None:
    assert place.find_place(EngineConfig(), {"SLURM_PROCID": "1"}) is None
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "gpu[07-09,11]"}
    assert found({}, node_rank=2, master_addr="a", master_port=5) == (2, 4, "a:5")
    assert found(slurm) == (3, 4, "gpu07:29500")
    assert found(slurm, node_rank=1, master_addr="a") == (1, 4, "a:29500")
    lws = {"LWS_WORKER_INDEX": "1", "LWS_GROUP_SIZE": "4", "LWS_LEADER_ADDRESS": "llm-0.llm.default", "TPU_WORKER_ID": "0"}
    assert found(lws) == (1, 4, "llm-0.llm.default:29500")
    assert found({"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "h0,h1,h2,h3"}) == (2, 4, "h0:29500")
    assert found({"JOB_COMPLETION_INDEX": "0"}, master_addr="llm-0.llm") == (0, 4, "llm-0.llm:29500")
    mpirun = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
    assert found(mpirun, master_addr="b") == (1, 4, "b:29500")
    assert found(mpirun | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, master_addr="::1") == (1, 4, "[::1]:29500")


@pytest.mark.parametrize(
    ("hosts", "first"), [("a", "a"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[007,9],m", "n007"), ("n,m[1-2]", "n"), ("n[1-2]-ib,x", "n1-ib")]
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert place.first_host(hosts) == first


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ({"nnodes": 2}, {}, "nnodes is 2, but node_rank is not given, and none of LWS_WORKER_INDEX, .* is set"),
        ({"nnodes": 2, "node_rank": 0}, {}, "nnodes is 2, but master_addr, the name or address of rank 0, is not given"),
        ({"nnodes": 2, "node_rank": 2, "master_addr": "a"}, {}, r"node_rank is 2, but must be in \[0, nnodes\), and nnodes is 2"),
        ({"nnodes": 2}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, r"nnodes is 2, but Slurm started 8 processes \(SLURM_NTASKS\)"),
        ({"nnodes": 0}, {}, r"nnodes is 0, but must be an integer in \[1, 4096\]"),
        ({"node_rank": 1}, {}, "node_rank is 1, but nnodes is 1"),
        ({"master_port": 70000}, {}, r"master_port is 70000, but must be an integer in \[1, 65535\]"),
        ({"master_addr": ""}, {}, "master_addr is '', but must be non-empty text"),
        ({"master_key": 5}, {}, "master_key is not text, but must be non-empty text"),
        ({"start_timeout": 0}, {}, "start_timeout is 0, but must be seconds in"),
        ({"nnodes": 2, "data_parallel_size": 2}, {}, "data_parallel_size is 2 and nnodes is 2, but several hosts run one engine"),
    ],
)
def test_wrong_places(options: dict[str, Any], environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place.find_place(EngineConfig(**options), environment)


def test_the_key_is_not_shown() -> None:
    config = EngineConfig(nnodes=2, node_rank=0, master_addr="a", master_key="sesame")
    assert "sesame" not in f"{config!r} {place.find_place(config)!r} {facts.of_code_and_flags(config)}"


def test_messages_keep_their_arrays() -> None:
    arrays = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": np.array([0.5], np.float32), "none": np.zeros((0, 2), np.int32)}
    kind, head, back = decode(encode("step", {"x": [1, None]}, arrays))
    assert (kind, head, set(back)) == ("step", {"x": [1, None]}, {"a", "b"})
    for name in back:
        np.testing.assert_array_equal(back[name], arrays[name])
        assert back[name].dtype == arrays[name].dtype


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x05\0\0\0{",
        b"\x02\0\0\0{}",
        encode("s", {}).replace(b"{}", b"[]"),
        encode("s", {}, {"a": np.ones(4)})[:-8],
        b"\xff\xff\xff\xff",
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="bytes are no message of pjax"):
        decode(data)


def test_objects_are_never_read() -> None:
    text = encode("s", {}, {"a": np.ones(1)}).replace(b"<f8", b"|O8")
    with pytest.raises(ValueError, match="array 'a' is"):
        decode(text)


def test_who_differs_is_named() -> None:
    assert disagreement({0: {"a": 1, "b": (1, 2)}, 1: {"a": 1, "b": [1, 2]}}) is None
    said = {0: {"max_num_seqs": 64, "f": None}, 1: {"max_num_seqs": 64, "f": None}, 2: {"max_num_seqs": 32, "g": "x"}}
    assert disagreement(said) == (
        "hosts disagree: rank 2 has max_num_seqs 32, rank 0 has 64; rank 2 has f none, rank 0 has None; rank 2 has g x, rank 0 has none"
    )
    many = disagreement({0: dict.fromkeys("abcdefg", 1), 1: dict.fromkeys("abcdefg", 2)})
    assert many is not None and many.endswith("; 2 more")


def test_what_hosts_compare(tmp_path: Path) -> None:
    """Sources, versions, every setting but those of one host alone, and what weights come from."""
    one, other = (facts.of_code_and_flags(EngineConfig(nnodes=2, node_rank=rank, master_addr="a", seed=rank)) for rank in (0, 1))
    assert one == other and one["jax"] == jax.__version__ and one["max_num_seqs"] is None and "node_rank" not in one
    (tmp_path / "a.py").write_text("x = 1")
    before = facts.digest_of_sources(tmp_path)
    (tmp_path / "a.py").write_text("x = 2")
    assert facts.digest_of_sources(tmp_path) != before
    big = tmp_path / "model.safetensors"
    big.write_bytes(bytes(5 << 20))
    texts = {facts.describe_file(big)}
    for at in (0, 5 << 19, (5 << 20) - 1):
        data = bytearray(5 << 20)
        data[at] = 1
        big.write_bytes(data)
        texts.add(facts.describe_file(big))
    assert len(texts) == 4 and all(text.startswith("of 5242880 bytes, ") for text in texts)
    (tmp_path / "README").write_text("no weights")
    assert [name for name, _ in facts._files(tmp_path)] == ["model.safetensors"]


@contextmanager
def linked(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Link, Link, list[Any], list[str]]]:
    """Two links of one connection; what the second got, and why it was lost."""
    monkeypatch.setattr(link, "BEAT", 0.05)
    news, lost = list[Any](), list[str]()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        outgoing = socket.create_connection(listener.getsockname())
        incoming, _ = listener.accept()
    ends: list[Any] = [None]
    thread = threading.Thread(target=lambda: ends.insert(0, secure(outgoing, b"k", listening=False)))
    thread.start()
    second = Link(secure(incoming, b"k", listening=True), "b", news.append, lost.append)
    thread.join()
    first = Link(ends[0], "a", lambda data: None, lambda why: None)
    for one in (first, second):
        one.patience = 0.3
        one.start()
    yield first, second, news, lost
    first.close(1)
    second.close(1)


def wait_for(check: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not check():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_link_that_has_nothing_to_say_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with linked(monkeypatch) as (first, _, news, lost):
        time.sleep(1.0)
        for number in range(3):
            first.send(bytes([number]) * 100_000)
        wait_for(lambda: len(news) == 3)
        assert [data[0] for data in news] == [0, 1, 2] and not lost


def test_silence_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    with linked(monkeypatch) as (first, _, _, lost):
        monkeypatch.setattr(first, "_queue", SimpleNamespace(get=lambda timeout: time.sleep(9) or b"", put_nowait=lambda data: None))
        wait_for(lambda: bool(lost))
        assert "it has said nothing for" in lost[0]


def test_a_host_that_takes_no_messages_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    with linked(monkeypatch) as (_, second, _, lost):
        monkeypatch.setattr(second._connection, "send_bytes", lambda data: time.sleep(2))
        started = time.monotonic()
        for _ in range(link.MAX_WAITING + 2):
            second.send(b"x")
        assert time.monotonic() - started < 1 and lost == [f"it has not taken {link.MAX_WAITING} messages"]


def test_what_the_other_end_said_before_it_went_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write fails at once when the other end has gone, but its last messages may not have been read by then."""
    with linked(monkeypatch) as (first, second, news, lost):
        heard = list[int]()
        monkeypatch.setattr(second, "_on_message", lambda data: (time.sleep(0.05), news.append(data)))
        monkeypatch.setattr(second, "_on_lost", lambda why: (heard.append(len(news)), lost.append(why)))
        for _ in range(4):
            first.send(b"x")
        first.close(1)
        monkeypatch.setattr(second._connection, "send_bytes", refuse)
        first._connection.close()
        wait_for(lambda: bool(lost))
        assert heard == [4] and "its connection broke" in lost[0]


def refuse(data: bytes) -> None:
    raise BrokenPipeError("gone")


def test_another_key_is_refused_on_both_sides() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        outgoing = socket.create_connection(listener.getsockname())
        incoming, _ = listener.accept()
    errors = list[BaseException]()

    def come() -> None:
        try:
            secure(outgoing, b"wrong", listening=False)
        except AuthenticationError as error:
            errors.append(error)

    thread = threading.Thread(target=come)
    thread.start()
    with pytest.raises(AuthenticationError):
        secure(incoming, b"right", listening=True)
    thread.join()
    assert len(errors) == 1


def test_hosts_come_late_and_come_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Longer apart than a silence that is a loss; one that has left before all were here has its place again."""
    ended, groups, errors = list[Any](), dict[int, Group](), list[BaseException]()
    monkeypatch.setattr(link, "BEAT", 0.05)
    monkeypatch.setattr(link, "STARTING", 0.5)
    monkeypatch.setattr(group, "GOODBYE", 1.0)
    monkeypatch.setattr(group, "_exit", lambda *said: ended.append(said))
    caplog.set_level("WARNING")
    port = free_port()

    def come(rank: int) -> None:
        try:
            groups[rank] = join(at(rank))
            groups[rank].agree({"a": 1})
        except BaseException as error:
            errors.append(error)

    def at(rank: int) -> place.Place:
        return place.Place(rank=rank, size=3, address="127.0.0.1", port=port, key=b"k", timeout=30)

    threads = [threading.Thread(target=come, args=(rank,), daemon=True) for rank in range(3)]
    threads[0].start()
    connection, _ = _reach(at(1))
    connection.send_bytes(encode("facts", {"a": 2}))
    connection.close()
    wait_for(lambda: "rank 1 at" in caplog.text and "has left" in caplog.text)
    threads[1].start()
    time.sleep(1.5)
    threads[2].start()
    for thread in threads:
        thread.join(20)
    assert not errors and not ended and sorted(groups) == [0, 1, 2]
    for one in (groups[1], groups[2], groups[0]):
        assert one.close()
    time.sleep(1.5)  # whoever has ended in order may go on with other work
    assert not ended


ROWS, LENGTH, PAGE = 64, 8192, 16


@pytest.mark.parametrize("num_pages", [80, 1000])
def test_a_follower_packs_what_rank_0_packs_from_a_few_kilobytes(num_pages: int) -> None:
    """64 sequences through prompts, decodes and preemptions: the arrays of every step, by plans of which it hears numbers only."""
    scheduler = Scheduler(
        num_pages=num_pages, page_size=PAGE, max_model_len=LENGTH, max_num_seqs=ROWS, max_num_batched_tokens=512,
        enable_prefix_caching=True, num_host_slots=0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    requests = [make_request(str(i), rng.integers(0, 250, int(rng.integers(1, 60))).tolist(), max_tokens=40) for i in range(100)]
    for request in requests:
        scheduler.add(request)
    leader, follower = Mirror(ROWS, LENGTH), Mirror(ROWS, LENGTH)
    buckets, sampling, decodes, steps = make_buckets(ROWS, 512), SamplingTable(ROWS), list[int](), 0
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan is not None
        tokens = scheduler.table.tokens
        message = leader.write(plan, tokens, [])
        _, head, arrays = decode(message)
        heard, new_rows = follower.read(head, arrays)
        bucket = find_bucket(buckets, plan.num_tokens, max(len(plan.rows), len(plan.sampled)), plan.num_decode == len(plan.rows))
        assert not new_rows and heard.num_decode == plan.num_decode
        one, other = pack(plan, tokens, sampling, bucket), pack(heard, follower.tokens, sampling, bucket)
        np.testing.assert_array_equal(heard.blocks, plan.blocks)
        for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=str(path))
        if plan.num_decode == len(plan.rows) and plan.num_decode > 32:
            decodes.append(len(message) * 64 // plan.num_decode)
        scheduler.commit(plan, rng.integers(0, 250, len(plan.sampled)).astype(np.int32), 0.0)
        steps += 1
    assert steps > 60
    if num_pages == 80:
        assert scheduler.num_preemptions > 0
    else:
        print(f"a step of 64 decode rows is told in {max(decodes)} bytes at most")
        assert decodes and max(decodes) < 3000


def test_new_rows_arrive_as_they_were() -> None:
    rules = LogitRules(allowed=frozenset({3, 1}), banned=frozenset({2}), bias=((4, 0.5),), bad_sequences=((1, 2), (3, 4, 5)))
    floats, ints = np.arange(8, dtype=np.float32), np.arange(8, dtype=np.int32)
    scheduler = Scheduler(num_pages=8, page_size=4, max_model_len=16, max_num_seqs=2, max_num_batched_tokens=16)
    scheduler.add(make_request("a", [5, 6, 7], max_tokens=2))
    plan = scheduler.schedule()
    assert plan is not None
    rows = [NewRow(0, floats, ints, rules, np.array([5, 6, 7], np.int32)), NewRow(1, floats + 1, ints + 1, None, None)]
    message = Mirror(2, 16).write(plan, scheduler.table.tokens, rows)
    _, head, arrays = decode(message)
    _, back = Mirror(2, 16).read(head, arrays)
    assert [(one.row, one.rules) for one in back] == [(0, rules), (1, None)]
    np.testing.assert_array_equal(back[0].known, [5, 6, 7])
    np.testing.assert_array_equal(back[1].floats, floats + 1)
    np.testing.assert_array_equal(back[1].ints, ints + 1)
    assert back[1].known is None


def test_a_host_that_fails_says_why_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its main thread ends the process at once; what waits to be sent is sent first."""
    said, at_the_end = list[bytes](), list[tuple[int, str, int]]()
    monkeypatch.setattr(group, "_exit", lambda status, message: at_the_end.append((status, message, len(said))))
    failing = Group(place.Place(rank=0, size=2, address="127.0.0.1", port=1, key=b"k", timeout=30))
    with linked(monkeypatch) as (first, _, _, _):
        failing._links[1] = first
        monkeypatch.setattr(first._connection, "send_bytes", lambda data: (time.sleep(0.2), said.append(data)) if data else None)
        failing._end("rank 0 failed: x")
        try:
            failing.quit()
            assert at_the_end[0] == (1, "rank 0 of 2 ends: rank 0 failed: x", 1)
            assert decode(said[0])[:2] == ("lost", {"message": "rank 0 failed: x"})
        finally:
            wait_for(lambda: len(at_the_end) == 2)  # the thread of its last words comes to the same
