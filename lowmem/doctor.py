"""What this machine can do for a run, and what stands in the way, each with its cure. Loads no torch.

A fault stops a run or makes it much slower than the machine is. A note is worth knowing. What cannot be
looked at on this system is said to be unknown.
"""

from __future__ import annotations

import mmap
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from lowmem.data.cache import cache_dir
from lowmem.data.packages import EXTRAS, is_there
from lowmem.machine.memory import available_bytes, total_bytes
from lowmem.machine.nvml import open_nvml
from lowmem.units import GIB, PAGE, format_bytes, shown

State = Literal["ok", "note", "fault", "unknown"]
LEAST_MEMORY, LEAST_DISK = 2 * GIB, 10 * GIB  # free: with less, little can be trained
NODES = Path("/proc/driver/nvidia")  # there where NVIDIA's kernel module is loaded


class Finding(NamedTuple):
    """One line about the machine. `cure`: what to do, empty where there is nothing to do."""

    name: str
    state: State
    found: str
    cure: str = ""


def examine(folder: Path) -> list[Finding]:
    """All that is looked at. `folder`: where runs would be; a small file is written there and removed."""
    checks: dict[str, Callable[[], Finding]] = {
        "torch": _torch,
        "graphics card": _card,
        "8-bit optimizer": _bitsandbytes,
        "memory": _memory,
        "memory limit": _limit,
        "page locking": _page_locking,
        "disk": lambda: _disk(folder),
        "unbuffered disk": lambda: _direct(folder),
        "cache folder": _cache,
        "system": lambda: _system(folder),
        "extras": _extras,
    }
    found = []
    for name, check in checks.items():
        try:
            found.append(check())
        except Exception as problem:  # a doctor must not fall ill: other systems refuse in other ways
            found.append(Finding(name, "unknown", f"cannot be looked at here ({shown(problem, 100)})"))
    return found


def healthy(findings: list[Finding]) -> bool:
    return all(finding.state != "fault" for finding in findings)


def _torch() -> Finding:
    cuda = _torch_cuda()
    if cuda is None:
        return Finding("torch", "fault", "not installed", "pip install torch")
    build = f"built for CUDA {cuda}" if cuda else "built for CPUs"
    if _card_name() and not cuda:
        cure = "install torch's CUDA build (pytorch.org, Get Started)"
        return Finding("torch", "fault", f"{version('torch')}, {build}, beside a card", cure)
    return Finding("torch", "ok", f"{version('torch')}, {build}")


def _torch_cuda() -> str | None:
    """The version of CUDA that torch was built for; empty: none; None: there is no torch."""
    spec = find_spec("torch") if is_there("torch") else None
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b.*= *'([^']+)'", text, re.MULTILINE)
    return found[1] if found else ""


def _card_name() -> str:
    ask = open_nvml()
    return "" if ask is None else str(ask("nvmlDeviceGetName") or "a card without a name")


def _card() -> Finding:
    name = _card_name()
    if name:
        return Finding("graphics card", "ok", name)
    if NODES.exists():
        cure = "restart the machine, or install the driver again; nvidia-smi says more"
        return Finding("graphics card", "fault", "NVIDIA's driver is loaded and does not answer", cure)
    if not is_there("pynvml"):
        return Finding("graphics card", "note", "cannot be asked for", "pip install nvidia-ml-py")
    return Finding("graphics card", "note", "none from NVIDIA with a driver; runs use the CPU")


def _bitsandbytes() -> Finding:
    name = "8-bit optimizer"
    cure = "pip install 'bitsandbytes>=0.50', or set optimizer.name: adamw"
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        return Finding(name, "fault", "bitsandbytes is not installed", cure)
    spec = find_spec("bitsandbytes") if is_there("bitsandbytes") else None
    if spec is None or spec.origin is None:
        return Finding(name, "fault", f"bitsandbytes {found} cannot be imported", cure)
    kind = "cuda" if _card_name() else "cpu"
    if not list(Path(spec.origin).parent.glob(f"libbitsandbytes_{kind}*")):
        return Finding(name, "fault", f"bitsandbytes {found} without its library for {kind}", cure)
    return Finding(name, "ok", f"bitsandbytes {found}, with its library for {kind}")


def _memory() -> Finding:
    free, whole = available_bytes(), total_bytes()
    said = f"{format_bytes(free)} of {format_bytes(whole)} can be had now"
    if free < LEAST_MEMORY:
        return Finding("memory", "fault", said, "close other programs; lowmem plan says what a run takes")
    return Finding("memory", "ok", said)


def _limit() -> Finding:
    machine, allowed = int(psutil.virtual_memory().total), total_bytes()
    if allowed < machine:
        said = f"a group allows {format_bytes(allowed)} of the machine's {format_bytes(machine)}"
        return Finding("memory limit", "note", said, "raise the container's or the service's memory limit")
    return Finding("memory limit", "ok", "none below the machine's memory")


def _page_locking() -> Finding:
    import resource  # not on Windows

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("page locking", "ok", "no limit")
    said = f"limited to {format_bytes(soft)} (ulimit -l)"
    if not _card_name():
        return Finding("page locking", "ok", f"{said}; it matters with a card alone")
    return Finding(
        "page locking", "note", said, "if a run says that locking was refused: ulimit -l unlimited"
    )


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    said = f"{format_bytes(free)} free in {shown(folder, 100)}"
    if free < LEAST_DISK:
        return Finding("disk", "note", said, "free space, or give another --run-dir")
    return Finding("disk", "ok", said)


def _direct(folder: Path) -> Finding:
    name = "unbuffered disk"
    if not hasattr(os, "O_DIRECT"):
        return Finding(name, "note", "this system has no O_DIRECT; blocks pass the page cache")
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".lowmem-doctor-") as place,
        mmap.mmap(-1, PAGE) as page,
    ):
        try:
            handle = os.open(Path(place) / "page", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
            try:
                os.write(handle, page)
            finally:
                os.close(handle)
        except OSError as problem:
            said = f"O_DIRECT is refused in {shown(folder, 100)} ({problem.strerror}); reads are cached"
            return Finding(name, "note", said, "give a --run-dir on a local ext4, xfs or btrfs")
    return Finding(name, "ok", f"O_DIRECT works in {shown(folder, 100)}")


def _cache() -> Finding:
    place = cache_dir()
    above = next(path for path in (place, *place.parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        cure = "set XDG_CACHE_HOME to a folder that can be written"
        return Finding("cache folder", "fault", f"{shown(place, 100)} cannot be written", cure)
    return Finding("cache folder", "ok", shown(place, 100))


def _system(folder: Path) -> Finding:
    said = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    if "microsoft" not in platform.release().lower():
        return Finding("system", "ok", said)
    if re.match(r"/mnt/[a-z](/|$)", str(folder.resolve())):
        cure = "keep runs in the Linux file system (~), which is many times faster"
        return Finding("system", "fault", f"{said}, WSL, on a Windows drive", cure)
    return Finding("system", "note", f"{said}, WSL", "half the memory by default: raise it in .wslconfig")


def _extras() -> Finding:
    missing = {extra: package for module, (package, extra) in EXTRAS.items() if not is_there(module)}
    for name in ("matplotlib", "jinja2"):
        if not is_there(name):
            missing["plots"] = name
    if not missing:
        return Finding("extras", "ok", "data, text, huggingface and plots are installed")
    words = ", ".join(f"{extra} ({package})" for extra, package in sorted(missing.items()))
    cure = f"when they are needed: pip install 'lowmem[{','.join(sorted(missing))}]'"
    return Finding("extras", "note", f"not installed: {words}", cure)


def report(findings: list[Finding]) -> dict[str, Any]:
    """The findings as one JSON object."""
    return {"healthy": healthy(findings), "findings": [finding._asdict() for finding in findings]}
