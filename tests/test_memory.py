"""How many pages the pool gets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pjax import ConfigError, memory
from pjax.config import EngineConfig
from pjax.kv_cache.layout import KVCacheLayout, KVCacheSpec, make_layout
from pjax.machine import host_free_bytes

MODEL = KVCacheLayout.uniform(2, 3, 64)
PAGE = 2 * 2 * 16 * 3 * 64 * 4  # bytes: keys and values, layers, tokens, heads, head size, float32


def pages(monkeypatch: pytest.MonkeyPatch, free: float, *, weight_bytes: int = 0, **fields: object) -> int:
    monkeypatch.setattr(memory, "_free_bytes", lambda devices: free)
    monkeypatch.setattr(memory.jax, "default_backend", lambda: "gpu")
    return memory.choose_num_pages(EngineConfig(**fields).for_platform("cpu"), MODEL, "float32", 1024, weight_bytes=weight_bytes)


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pages(monkeypatch, 0, num_pages=7) == 7
    assert pages(monkeypatch, 0, kv_cache_memory=5 * PAGE + 1) == 5
    with pytest.raises(ConfigError, match=f"kv_cache_memory is {PAGE - 1} bytes, but one page takes {PAGE}"):
        pages(monkeypatch, 0, kv_cache_memory=PAGE - 1)


def test_a_pool_has_a_page_for_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free_bytes", lambda devices: 1e9)
    layout = make_layout([KVCacheSpec(num_kv_heads=1, head_size=8, sliding_window=window) for window in (None, 64)], 1024)
    with pytest.raises(ConfigError, match="the page pool has 2 pages, but must have at least 3: one for each group of layers"):
        memory.choose_num_pages(EngineConfig(num_pages=2).for_platform("cpu"), layout, "float32", 1024)


@pytest.mark.parametrize("asked", [{"num_pages": 7}, {"kv_cache_memory": 7 * PAGE}])
def test_a_cpu_must_have_what_is_asked_for_unless_lazy(asked: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(free: int, num_devices: int = 1, **fields: object) -> int:
        monkeypatch.setattr(memory, "host_free_bytes", lambda: free)
        devices = [SimpleNamespace(platform="cpu")] * num_devices
        config = EngineConfig(**asked, **fields).for_platform("cpu")
        return memory.choose_num_pages(config, MODEL, "float32", 1024, weight_bytes=PAGE, devices=devices)

    assert chosen(0, lazy=True) == chosen(0, warmup="background") == 7
    assert chosen(8 * PAGE, warmup="all") == chosen(16 * PAGE, num_devices=2, warmup="all") == 7
    for too_little in ({"free": 8 * PAGE - 1}, {"free": 16 * PAGE - 2, "num_devices": 2}):
        with pytest.raises(
            ConfigError, match=f"the page pool is {7 * PAGE} bytes, but {7 * PAGE - 1} are free; it takes memory as it fills"
        ):
            chosen(**too_little, warmup="all")


def write_group(folder: Path, limit: object, used: int, cached: int, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("max", "current", "inactive_file") if version == 2 else ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
    (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
    (folder / f"memory.{names[1]}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\n")


def test_a_container_has_what_its_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    member = tmp_path / "member"
    assert host_free_bytes(tmp_path, member) == 1000  # no such files
    member.write_text("0::/\n")
    assert host_free_bytes(tmp_path, member) == 1000
    for limit, free in ((700, 450), (5000, 1000), ("max", 1000), (200, 0)):
        write_group(tmp_path, limit, 300, 50)
        assert host_free_bytes(tmp_path, member) == free


@pytest.mark.parametrize("path", ["/job_7/step_0", "/job_7/step_0/task", "/../job_7/step_0"])
def test_a_job_has_what_the_limits_of_its_groups_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Slurm, systemd-run, a container with its host's groups: the limit is not the root's. The narrowest counts, wherever it is."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    (member := tmp_path / "member").write_text(f"0::{path}\n")
    root = tmp_path / "cgroup"
    write_group(root / "job_7", 900, 200, 10)
    write_group(root / "job_7" / "step_0", "max", 200, 10)
    write_group(root / "job_8", 1, 0, 0)
    assert host_free_bytes(root, member) == (1000 if ".." in path else 710)
    write_group(root / "job_7" / "step_0", 700, 200, 0)
    assert host_free_bytes(root, member) == (1000 if ".." in path else 500)


def test_groups_of_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    (member := tmp_path / "member").write_text("5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/docker/1\n")
    write_group(tmp_path / "cgroup" / "cpu", 10, 0, 0, version=1)
    assert host_free_bytes(tmp_path / "cgroup", member) == 1000
    write_group(tmp_path / "cgroup" / "memory", 700, 300, 20, version=1)  # as a container sees its own group
    assert host_free_bytes(tmp_path / "cgroup", member) == 420
    write_group(tmp_path / "cgroup" / "memory", 1 << 63, 300, 20, version=1)
    write_group(tmp_path / "cgroup" / "memory" / "docker" / "1", 650, 300, 20, version=1)
    assert host_free_bytes(tmp_path / "cgroup", member) == 370


def test_a_share_of_what_is_free_after_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pages(monkeypatch, 10 * PAGE, memory_share=0.5) == 5
    assert pages(monkeypatch, 10 * PAGE, memory_share=0.5, weight_bytes=4 * PAGE) == 3
    with pytest.raises(ConfigError, match="bytes for the page pool, but one page takes"):
        pages(monkeypatch, 10 * PAGE, weight_bytes=10 * PAGE)


def test_no_more_than_all_sequences_at_full_length_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pages(monkeypatch, 1e12, max_num_seqs=3) == 3 * 64


def test_a_little_more_or_less_free_memory_gives_the_same_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's size is part of a compiled step's shape: a new one would miss the compilation cache."""
    counts = {pages(monkeypatch, free * PAGE, memory_share=1.0) for free in range(3190, 3290)}
    assert len(counts) == 2
    assert all(0.93 * 3190 <= count < 3290 for count in counts)


def test_the_log_line_says_what_fits() -> None:
    line = memory.describe_pool(100, 16, 512, MODEL, 64)
    assert line == "page pool: 100 pages of 16 = 1600 tokens, 3.1 requests of 512 tokens"


def test_the_log_line_says_what_windows_save() -> None:
    """22 of 26 layers see 512 tokens: a request of 32,768 has 2048 pages of 4 layers, and of each of 6 groups of others 42 + 32 + 1."""
    specs = [KVCacheSpec(num_kv_heads=1, head_size=256, sliding_window=None if layer % 6 == 5 else 512) for layer in range(26)]
    layout = make_layout(specs, 32768)
    line = memory.describe_pool(9000, 16, 32768, layout, 512)
    each = 2048 + 6 * ((511 + 512 + 15) // 16 + 1)
    assert line == (
        f"page pool: 9000 pages of 16 tokens in 4 layers (4 full, 22 with window 512), {8999 / each:.1f} requests of 32768 tokens, "
        f"{each * 4 / (2048 * 26):.0%} of a full cache each"
    )


@pytest.mark.parametrize(
    ("fields", "platform", "sizes"),
    [
        ({}, "cpu", (64, 512)),
        ({}, "tpu", (256, 2048)),
        ({"max_num_seqs": 700}, "cpu", (700, 700)),
        ({"max_num_batched_tokens": 32}, "gpu", (32, 32)),
        ({"max_num_seqs": 3}, "gpu", (3, 2048)),
    ],
)
def test_the_sizes_of_a_step_suit_the_device(fields: dict[str, int], platform: str, sizes: tuple[int, int]) -> None:
    assert EngineConfig(**fields).for_platform(platform).step_sizes == sizes
