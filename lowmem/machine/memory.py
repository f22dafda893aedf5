"""Tells how much memory this machine has, and how much of it is left.

A memory cgroup (version 1 or 2) that this process is in, or a parent of it, may allow less than the machine
has; the smallest figure counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUP_FILE, CGROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# By version: the file of the limit, the file of what is used, and the names in memory.stat of cached file
# pages, which the kernel drops when memory is short.
FILES = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


def total_bytes() -> int:
    """Memory that this process could ever have."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits())])


def available_bytes() -> int:
    """Memory that can be had now, before the machine swaps or the kernel kills a process."""
    return max(min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _limits())]), 0)


def memory_groups() -> Iterator[Path]:
    """Folders of the cgroups that this process is in and that may limit memory."""
    for line in CGROUP_FILE.read_text().splitlines() if CGROUP_FILE.is_file() else []:
        _, controllers, path = line.split(":", 2)
        # Version 2 has one hierarchy, without names of controllers; version 1 has one for memory.
        if not controllers or "memory" in controllers.split(","):
            yield CGROUP_ROOT / ("memory" if controllers else "") / path.strip("/")


def _limits() -> Iterator[tuple[int, int]]:
    """Yields (allowed, in use) of each group that limits memory, in bytes.

    "No limit" is a number far above any machine's in version 1, and in version 2 the word max, which is no
    number.
    """
    for group in memory_groups():
        for folder in (group, *group.parents):
            for limit, used, reclaimable in FILES:
                with contextlib.suppress(OSError, ValueError):
                    yield int((folder / limit).read_text()), _in_use(folder, used, reclaimable)


def _in_use(folder: Path, used: str, reclaimable: tuple[str, ...]) -> int:
    with contextlib.suppress(OSError, ValueError):
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int((folder / used).read_text()) - sum(int(stat.get(name, 0)) for name in reclaimable)
    return 0
