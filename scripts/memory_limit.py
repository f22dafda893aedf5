"""Runs a child process under a hard memory limit, for measurements that show what a budget is worth."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lowmem.machine.memory import memory_groups

# A cgroup's file of its limit -> its file of the peak so far, in version 2 and in version 1.
PEAK_FILES = {"memory.max": "memory.peak", "memory.limit_in_bytes": "memory.max_usage_in_bytes"}


class Limit(NamedTuple):
    """A limit that a child enters before it starts: `subprocess.run(..., preexec_fn=limit.enter)`."""

    # "memory cgroup": the kernel kills a process that goes over it. "RLIMIT_DATA": an allocation fails.
    kind: str
    enter: Callable[[], None]
    peak_bytes: Callable[[], int | None]  # so far; None if that is not known


@contextlib.contextmanager
def memory_limit(limit_bytes: int, name: str) -> Iterator[Limit]:
    """A limit in bytes: a memory cgroup with that name in its own, if this user may make one, else
    RLIMIT_DATA of each process.
    """
    made = _own_group(limit_bytes, f"lowmem-{name}-{os.getpid()}")
    if made is None:
        resource: Any = importlib.import_module("resource")  # not every system has it
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
    """Makes a group below one of this process's groups; returns its folder and the file of its peak.

    None if this user may make none.
    """
    for group in memory_groups():
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
