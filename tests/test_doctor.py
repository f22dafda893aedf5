"""The doctor names what is missing and its cure, and falls ill of nothing: tried by taking things away."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowmem import doctor
from lowmem.doctor import Finding, examine, healthy
from lowmem.units import GIB

Patch = pytest.MonkeyPatch


def found(name: str, folder: Path) -> Finding:
    return next(finding for finding in examine(folder) if finding.name == name)


def no_direct(patch: Patch) -> None:
    opened = os.open

    def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *more, **named)

    patch.setattr(os, "open", refuse)


def a_card(patch: Patch) -> None:
    patch.setattr(doctor, "open_nvml", lambda: lambda call, *_: "Card 1")


def no_library(patch: Patch, folder: Path) -> None:
    looked_for = importlib.util.find_spec

    def elsewhere(name: str) -> Any:
        return SimpleNamespace(origin=str(folder / "x.py")) if name == "bitsandbytes" else looked_for(name)

    patch.setattr(doctor, "find_spec", elsewhere)


def gone(module: str) -> Any:
    return lambda patch, _: patch.setitem(sys.modules, module, None)


def small(name: str) -> Any:
    return lambda patch, _: patch.setattr(doctor, name, lambda: GIB)


def full_disk(patch: Patch, _: Path) -> None:
    patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=GIB))


def no_cache(patch: Patch, _: Path) -> None:
    patch.setenv("XDG_CACHE_HOME", "/proc/x")


def wsl(patch: Patch, _: Path) -> None:
    patch.setattr(platform, "release", lambda: "5-Microsoft")


def no_cuda_build(patch: Patch, _: Path) -> None:
    patch.setattr(doctor, "_torch_cuda", lambda: "")
    a_card(patch)


TAKEN: list[tuple[str, str, str, str, Any]] = [
    ("torch", "fault", "not installed", "pip install torch", gone("torch")),
    ("torch", "fault", "built for CPUs, beside a card", "CUDA build", no_cuda_build),
    ("graphics card", "ok", "Card 1", "", lambda p, _: a_card(p)),
    ("graphics card", "fault", "does not answer", "nvidia-smi", lambda p, f: p.setattr(doctor, "NODES", f)),
    ("graphics card", "note", "asked for", "nvidia-ml-py", gone("pynvml")),
    ("8-bit optimizer", "fault", "without its library for cpu", "optimizer.name: adamw", no_library),
    ("memory", "fault", "1.00 GiB of", "close", small("available_bytes")),
    ("memory limit", "note", "allows 1.00 GiB", "limit", small("total_bytes")),
    ("disk", "note", "1.00 GiB free", "--run-dir", full_disk),
    ("unbuffered disk", "note", "Invalid argument", "ext4", lambda p, _: no_direct(p)),
    ("cache folder", "fault", "cannot be written", "XDG_CACHE_HOME", no_cache),
    ("system", "note", "WSL", ".wslconfig", wsl),
    ("extras", "note", "scikit-learn", "lowmem[data]", gone("sklearn")),
    ("page locking", "unknown", "cannot be looked at", "", gone("resource")),
]


@pytest.mark.parametrize(("name", "state", "words", "cure", "take"), TAKEN)
def test_what_is_taken_away_is_named_with_its_cure(
    tmp_path: Path, monkeypatch: Patch, name: str, state: str, words: str, cure: str, take: Any
) -> None:
    (tmp_path / "libbitsandbytes_cuda").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("/proc"))
    take(monkeypatch, tmp_path)
    finding = found(name, tmp_path)
    assert (finding.state, words in finding.found, cure in finding.cure) == (state, True, True), finding
    assert "\n" not in finding.found + finding.cure
    assert healthy([finding]) == (state != "fault")


def test_nothing_is_left_behind_and_torch_is_not_loaded(tmp_path: Path) -> None:
    lines = ["import sys", "from lowmem import cli", "try: cli.main()"]
    lines += ["except SystemExit as e: print(e.code, 'torch' in sys.modules, file=sys.stderr)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), "doctor", str(tmp_path), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    told = json.loads(done.stdout)
    faults = [finding for finding in told["findings"] if finding["state"] == "fault"]
    assert told["healthy"] == (not faults) and len(told["findings"]) == 11
    assert done.stderr.split()[-2:] == [str(int(bool(faults))), "False"]
    assert list(tmp_path.iterdir()) == []
