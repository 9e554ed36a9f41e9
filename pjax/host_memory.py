"""Memory that is free on the host. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # of this process, as a container sees it


def host_free_bytes(cgroup: Path = CGROUP) -> int:
    """Memory that is free on this machine, or in this container where it may use less (cgroup v2; what caches files can be had back)."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit, used = int((cgroup / "memory.max").read_text()), int((cgroup / "memory.current").read_text())
        cached = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, ValueError, KeyError):  # no such limit: "max", or no such system
        return free
    return min(free, max(limit - used + int(cached), 0))
