"""How much memory this machine has, and has left, where a memory cgroup (version 1 or 2) or a parent of it
may allow less.

Also a hard limit of one's own: for measurements that show what a budget is worth.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

CGROUP_FILE, CGROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
FILES = (  # limit, used, in memory.stat: pages of files that go when memory is short
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)
PEAK_FILES = {"memory.max": "memory.peak", "memory.limit_in_bytes": "memory.max_usage_in_bytes"}


def total_bytes() -> int:
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits())])


def available_bytes() -> int:
    """That can be had before the machine swaps or the kernel kills, now."""
    return max(min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _limits())]), 0)


def _limits() -> Iterator[tuple[int, int]]:
    """(allowed, in use) of each group that this process is in. "No limit" is a number far above any
    machine's, or the word max.
    """
    for group in _groups():
        for folder in (group, *group.parents):
            for limit, used, reclaimable in FILES:
                with contextlib.suppress(OSError, ValueError):
                    yield int((folder / limit).read_text()), _in_use(folder, used, reclaimable)


def _groups() -> Iterator[Path]:
    """Folders of the groups that this process is in and that may limit memory."""
    for line in CGROUP_FILE.read_text().splitlines() if CGROUP_FILE.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            yield CGROUP_ROOT / ("memory" if controllers else "") / path.strip("/")


def _in_use(folder: Path, used: str, reclaimable: tuple[str, ...]) -> int:
    with contextlib.suppress(OSError, ValueError):
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int((folder / used).read_text()) - sum(int(stat.get(name, 0)) for name in reclaimable)
    return 0


class Limit(NamedTuple):
    # what limits: the kernel kills a process over a memory cgroup's limit; over RLIMIT_DATA an allocation
    # fails
    kind: str
    enter: Callable[[], None]  # for a child to call before it starts
    peak_bytes: Callable[[], int | None]  # so far, if that is known


@contextlib.contextmanager
def memory_limit(limit_bytes: int, name: str) -> Iterator[Limit]:
    """A limit of that many bytes: a memory cgroup of that name where this user may make one, else RLIMIT_DATA
    of each process.
    """
    made = _own_group(limit_bytes, f"lowmem-{name}-{os.getpid()}")
    if made is None:
        resource: Any = importlib.import_module("resource")  # not on every system
        yield Limit(
            "RLIMIT_DATA",
            lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes)),
            lambda: None,
        )
        return
    folder, peak_file = made
    try:
        yield Limit(
            "memory cgroup",
            lambda: _write(folder / "cgroup.procs", os.getpid()),
            lambda: _read(folder / peak_file),
        )
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _own_group(limit_bytes: int, name: str) -> tuple[Path, str] | None:
    """(folder, file of the peak) of a new group below one of this process's; None where this user may make
    none.
    """
    for group in _groups():
        for limit_file, peak_file in PEAK_FILES.items():
            try:
                (group / name).mkdir()
                (group / name / limit_file).write_text(str(limit_bytes))
                return group / name, peak_file
            except OSError:
                with contextlib.suppress(OSError):
                    (group / name).rmdir()
    return None


def _write(path: Path, value: int) -> None:
    path.write_text(str(value))


def _read(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None
