"""What this machine, or this container or job of it, may use. Nothing heavy is imported here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # as this process sees them
MEMBERSHIP = Path("/proc/self/cgroup")  # the groups that it is in
V1_LIMIT, V1_USED, V1_CACHED = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
V2_LIMIT, V2_USED, V2_CACHED = "memory.max", "memory.current", "inactive_file"


def num_cpus() -> int:
    """CPUs that this process may run on, by its affinity; a quota of time is not looked at."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def expand_user(path: str | Path) -> Path:
    """The path with `~` and `~user` as their homes; as it is where there is no such home."""
    return Path(os.path.expanduser(path))


def user_folder(variable: str, below_home: str) -> Path | None:
    """The user's folder that a variable of the environment names, or one below the home; None for a user without a home.

    Containers run under user ids that no password file has. Whether the folder is there, or can be made, is not looked at.
    """
    if named := os.environ.get(variable):
        return Path(named)
    try:
        return Path.home() / below_home
    except RuntimeError:
        return None


def host_free_bytes(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Memory that is free on this machine, or to this process where a container or a job may use less.

    The limits of its control groups, version 1 or 2, and of those that these are in; what caches files can be had back.
    """
    import psutil

    free = int(psutil.virtual_memory().available)
    for folder, names in _groups(cgroups, membership):
        try:
            free = min(free, max(_left(folder, *names), 0))
        except (OSError, ValueError, KeyError):  # no limit: "max", or no such file
            continue
    return free


def _left(folder: Path, limit: str, used: str, cached: str) -> int:
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int((folder / limit).read_text()) - int((folder / used).read_text()) + int(stat[cached])


def _groups(cgroups: Path, membership: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of the process's groups, its own before those around it, and their files' names.

    A container may see its group's path as the host does, but its own group as the root: the root is always among them.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (cgroups / "memory", (V1_LIMIT, V1_USED, V1_CACHED)) if controllers else (cgroups, (V2_LIMIT, V2_USED, V2_CACHED))
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            yield folder, names
            if folder == root:
                break
