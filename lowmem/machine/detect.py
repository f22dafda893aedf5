"""Finds out what this machine is: describes it as a profile, and chooses the device that a profile trains on.

What a machine has is asked of the system and the driver. Rates, and what the runtime takes, are measured only
on request: that takes a minute and writes a file.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import mmap
import os
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.errors import ProfileError
from lowmem.machine import memory
from lowmem.machine.nvml import open_nvml
from lowmem.machine.profile import DETECTED, LinkSpec, Profile, profile_from_dict
from lowmem.units import GIB, MIB

if TYPE_CHECKING:
    from lowmem.machine.device import CardFacts, Device

# PCIe generation -> GiB/s of one lane in one direction, in theory.
LANE_GIB_PER_S = {1: 0.233, 2: 0.466, 3: 0.917, 4: 1.834, 5: 3.668, 6: 7.043}
LINK_FRACTION = 0.8  # of the theoretical rate, what a copy from pinned memory reaches
LINK_UNKNOWN_GIB_PER_S = 12.0  # the rate where NVML does not tell the link
MEASURE_BYTES = 256 * MIB
LEAST_RUNTIME_BYTES = 32 * MIB
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
RUNTIME_PROBE = ("-m", "lowmem.runtime_probe")  # a module of a higher floor, so it is run and not imported
RUNTIME_PROBE_TIMEOUT_S = 300


def training_device(profile: Profile) -> Device:
    """Returns the device to train on. Raises ProfileError if this machine has none of the profile's type."""
    from lowmem.machine.device import cuda_works, mps_works, open_device, xpu_works

    kind = profile.device.type
    works = {
        "cuda": ("a CUDA device", cuda_works),
        "mps": ("an Apple GPU", mps_works),
        "xpu": ("an Intel GPU", xpu_works),
    }
    if kind in works and not works[kind][1]():
        raise ProfileError(
            f"profile {profile.name}: needs {works[kind][0]} and none is found here; "
            "use --dry-run, or a cpu profile (`lowmem profiles` lists them)"
        )
    return open_device(kind)


def detect_profile(measure: bool = False, folder: Path | None = None) -> Profile:
    """Describes this machine as a profile named `detected`.

    `measure` adds rates; the disk is that of `folder` (None: the working folder). Raises ProfileError if
    neither driver nor torch tells the device's memory, or if `folder` cannot be written.
    """
    host_bytes = memory.total_bytes()
    in_use = host_bytes - memory.available_bytes()  # by others: this process has hardly begun
    host = {"memory_gib": _gib(host_bytes), "reserve_gib": _gib(max(host_bytes / 4, in_use))}
    found = _detect_cuda(host) or {
        "device": {"type": "cpu", **host, "compute_dtype": "float32"},
        "source": f"{os.cpu_count()} CPU threads",
    }
    if "link" in found:  # page-locked memory cannot be swapped, so the half of what runs may use is the most
        host["pinned_max_gib"] = _gib((host_bytes - max(host_bytes / 4, in_use)) / 2)
    raw = {"schema": 1, "name": DETECTED, "host": host, "disk": {"reserve_gib": 10.0}, **found}
    how = "detected"
    if measure:
        raw["disk"].update(_measure_disk(folder or Path.cwd()))
        how = "measured" if _measure_device(raw, folder or Path.cwd()) else "disk measured"
    raw["source"] = f"{how} {datetime.date.today().isoformat()}, {raw['source']}"
    return profile_from_dict(raw, "detect")


def _gib(num_bytes: float) -> float:
    """GiB to three places, rounded down: a profile must not promise more than there is."""
    return num_bytes * 1000 // GIB / 1000


def _detect_cuda(host: dict[str, float]) -> dict[str, Any] | None:
    """Asks NVML, or torch where NVML does not answer, for `device`, `link` and `source`.

    Returns None if there is no CUDA device. Raises ProfileError if nobody tells its memory.
    """
    ask = open_nvml()
    # Importing torch takes a second, and it is asked only where NVML cannot tell: in some containers, on
    # ROCm, and on devices whose memory is the host's.
    found = ask and ask("nvmlDeviceGetMemoryInfo")
    by_torch = None if found else _torch_says()
    if ask is None and by_torch is None:
        return None
    ask = ask or (lambda call: None)
    name = ask("nvmlDeviceGetName") or (by_torch.name if by_torch else "NVIDIA device")
    major, _ = ask("nvmlDeviceGetCudaComputeCapability") or (by_torch.capability if by_torch else (0, 0))
    device: dict[str, Any] = {"type": "cuda", "compute_dtype": "bfloat16" if major >= 8 else "float32"}
    total_bytes = found.total if found else (by_torch.total_bytes if by_torch else 0)
    if by_torch and by_torch.integrated:
        return {"device": {**device, **host, "unified": True}, "source": name}
    if not total_bytes:
        raise ProfileError(
            f"detect: neither NVML nor torch tells the memory of {name}; "
            "write a profile by hand and give its path"
        )
    lane = LANE_GIB_PER_S.get(ask("nvmlDeviceGetMaxPcieLinkGeneration") or 0, 0)
    lanes = ask("nvmlDeviceGetMaxPcieLinkWidth") or 0
    rate = round(lane * lanes * LINK_FRACTION, 1) or LINK_UNKNOWN_GIB_PER_S
    device |= {"memory_gib": _gib(total_bytes), "reserve_gib": _gib(total_bytes / 10)}
    return {"device": device, "link": dict.fromkeys(LinkSpec.model_fields, rate), "source": name}


def _torch_says() -> CardFacts | None:
    with contextlib.suppress(ImportError):
        from lowmem.machine.device import cuda_facts

        return cuda_facts()
    return None


# ------------------------------------------------------------------------------------------------------------
# Measuring


def _measure_disk(folder: Path) -> dict[str, float]:
    """Measures GiB/s of one large file without a name, past the page cache.

    The read rate is left out where the cache cannot be avoided. Raises ProfileError.
    """
    try:
        with (
            tempfile.TemporaryFile(dir=folder, buffering=0) as file,
            mmap.mmap(-1, min(MEASURE_BYTES, 8 * MIB)) as chunk,  # on a page, as O_DIRECT wants it
        ):
            chunk[:] = os.urandom(len(chunk))  # random, so that no disk can compress it
            # not every system and file system has O_DIRECT
            with contextlib.suppress(ImportError, AttributeError, OSError):
                fcntl: Any = importlib.import_module("fcntl")
                fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_DIRECT)
            start = timeit.default_timer()
            for _ in range(MEASURE_BYTES // len(chunk)):
                file.write(chunk)
            os.fsync(file.fileno())
            rates = {"write_gib_per_s": MEASURE_BYTES / GIB / (timeit.default_timer() - start)}
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.seek(0)
                start = timeit.default_timer()
                while file.readinto(chunk):
                    pass
                rates["read_gib_per_s"] = MEASURE_BYTES / GIB / (timeit.default_timer() - start)
            return {key: round(rate, 3) for key, rate in rates.items()}
    except OSError as found:
        raise ProfileError(
            f"detect: no test file in {folder}: {found.strerror}; "
            f"allowed: a folder to write {MEASURE_BYTES} bytes in"
        ) from None


def _measure_device(raw: dict[str, Any], folder: Path) -> bool:
    """Adds peak_tflops, runtime_gib and the memory's and the link's rates to `raw`.

    Returns False, and adds nothing, if torch cannot use the device.
    """
    import torch

    from lowmem.machine.device import cuda_works, open_device

    device, cuda = raw["device"], raw["device"]["type"] == "cuda"
    if cuda and not cuda_works():
        return False
    opened = open_device(device["type"])
    runtime_bytes = _measure_runtime(folder)
    if runtime_bytes is not None:
        device["runtime_gib"] = _gib(runtime_bytes)

    def best_s(run: Callable[[], object]) -> float:
        """The shortest of 3 runs, after one that warms up."""

        def timed() -> None:
            run()
            opened.wait_for_compute()

        return min(timeit.repeat(timed, number=1, repeat=4)[1:])

    size = MATMUL_SIZE[device["type"]]
    a = torch.randn(size, size, device=device["type"], dtype=getattr(torch, device["compute_dtype"]))
    device["peak_tflops"] = round(2 * size**3 / best_s(lambda: a @ a) / 1e12, 6)
    source, target = (torch.ones(MEASURE_BYTES, dtype=torch.uint8, device=device["type"]) for _ in range(2))
    moved_gib = 2 * MEASURE_BYTES / GIB  # read and written
    device["memory_gib_per_s"] = round(moved_gib / best_s(lambda: target.copy_(source)), 2)
    # pinned memory may be refused: the link then keeps the rate that follows from its lanes
    with contextlib.suppress(RuntimeError):
        if "link" in raw:
            host = torch.ones(MEASURE_BYTES, dtype=torch.uint8, pin_memory=True)
            there = torch.empty_like(host, device="cuda")
            moves = {
                "host_to_device_gib_per_s": lambda: there.copy_(host, True),
                "device_to_host_gib_per_s": lambda: host.copy_(there, True),
            }
            raw["link"] = {key: round(MEASURE_BYTES / GIB / best_s(move), 2) for key, move in moves.items()}
    return True


def _measure_runtime(folder: Path) -> int | None:
    """Bytes that the runtime takes before the first tensor: a small run's peak less what the run holds.

    None if the run fails, or if NVML does not tell one process's memory here: the figure would be too small.
    """
    try:
        child = subprocess.run(
            [sys.executable, *RUNTIME_PROBE, str(folder)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=RUNTIME_PROBE_TIMEOUT_S,
            check=True,
        )
        found = int(child.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return found if found >= LEAST_RUNTIME_BYTES else None
