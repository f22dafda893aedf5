"""What a process that trains takes before it holds any of the model, measured once for the packages here.

It is a constant of one build. With the CUDA build of torch the import alone takes twice what it takes with
the CPU build. So a child process imports what training imports, computes a little, and says what it holds.
A library that only some runs import is measured the same way, beside that. The figures are kept in the user's
cache folder, under the versions that they were measured with.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Literal

from lowmem.machine.nvml import open_nvml
from lowmem.units import MIB

PROBE = ("-m", "lowmem.floor_probe")
LIMIT_S = 120
FIELD = "floor_bytes"
MOST_BYTES = 1 << 34  # a kept figure beyond this was not written by us
NAME = {"cpu": "runtime-floor", "cuda": "runtime-floor-cuda"}
# Packages that the figures depend on. A figure of one build is of no use for another.
PACKAGES = ("torch", "numpy", "pydantic", "psutil", "bitsandbytes", "lowmem")
LIBRARY_PACKAGES = ("transformers", "tokenizers", "peft", "accelerate")
Library = Literal["bitsandbytes", "compiler", "transformers", "peft"]


@functools.cache
def measured_floor_bytes(kind: str = "cpu", cache: Path | None = None) -> int | None:
    """What such a process takes of a CPU's memory, or of this machine's CUDA card beside torch's allocator:
    bytes, rounded up to MiB. None where it cannot be measured.

    `cache`: the folder of the kept figure; None: the user's own.
    """
    return _measured(NAME[kind], (kind,), _build(kind), cache)


@functools.cache
def measured_library_bytes(library: Library, cache: Path | None = None) -> int | None:
    """What such a process takes of a CPU's memory for a library that it imports: bytes, rounded up to MiB.
    None where it cannot be measured, because it is not installed.

    "compiler" is torch's, of which a plan imports a part. transformers brings it. peft brings transformers
    and bitsandbytes: what they bring is counted with them.
    """
    return _measured(f"runtime-{library}", ("cpu", library), _build("cpu", LIBRARY_PACKAGES), cache)


def _measured(name: str, arguments: tuple[str, ...], build: str, cache: Path | None) -> int | None:
    """The figure that is kept for this build, or else the probe's, which is kept. Each build has its file:
    two installations would measure again and again if they shared one.
    """
    path = (cache or _cache_folder()) / f"{name}-{build[:16]}.json"
    kept = _read(path, build)
    if kept is not None:
        return kept
    try:
        done = subprocess.run(
            [sys.executable, *PROBE, *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=LIMIT_S,
            check=True,
        )
        measured = -(-int(done.stdout) // MIB) * MIB
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    with contextlib.suppress(OSError):  # it is measured again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"build": build, FIELD: measured}), encoding="utf-8")
        temporary.replace(path)
    return measured


def _read(path: Path, build: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["build"] == build and 0 < kept[FIELD] < MOST_BYTES:
            return int(kept[FIELD])
    return None


def _build(kind: str, more: tuple[str, ...] = ()) -> str:
    """What a figure depends on: the interpreter, its packages, the card, and the probe."""
    from importlib.metadata import PackageNotFoundError, version

    probe = Path(__file__).parents[1].joinpath("floor_probe.py").read_text(encoding="utf-8")
    parts = [sys.executable, sys.version, platform.machine(), str(os.cpu_count()), probe]
    if kind == "cuda":
        ask = open_nvml()
        parts += [str(ask and ask(call)) for call in ("nvmlDeviceGetName", "nvmlDeviceGetUUID")]
    for name in (*PACKAGES, *more):
        with contextlib.suppress(PackageNotFoundError):
            parts.append(f"{name} {version(name)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lowmem"
