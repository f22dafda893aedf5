"""TODO module docstring."""

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
from typing import Any

import torch

from lowmem.errors import ProfileError
from lowmem.machine.nvml import open_nvml
from lowmem.machine.profile import LinkSpec, Profile, profile_from_dict
from lowmem.units import GIB, MIB

LANE_GIB_PER_S = {
    1: 0.233,
    2: 0.466,
    3: 0.917,
    4: 1.834,
    5: 3.668,
    6: 7.043,
}  # PCIe generation: one lane, one direction, in theory


LINK_FRACTION, LINK_UNKNOWN_GIB_PER_S = (
    0.8,
    12.0,
)  # what a pinned copy reaches, of the theoretical rate; the rate where NVML does not tell


MEASURE_BYTES = 256 * MIB


LEAST_RUNTIME_BYTES = 32 * MIB


MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


def detect_profile(measure: bool = False, folder: Path | None = None) -> Profile:
    """A profile of this machine, named `detected`; `measure` adds rates (`folder`: on the disk to measure;
    None: the working folder).

    Raises ProfileError: neither driver nor torch tells the device's memory, or `folder` cannot be written.
    """
    from lowmem.machine import memory  # psutil

    host_bytes = memory.total_bytes()
    in_use = host_bytes - memory.available_bytes()  # by others: this process has hardly begun
    host = {"memory_gib": _gib(host_bytes), "reserve_gib": _gib(max(host_bytes / 4, in_use))}
    found = _detect_cuda(host) or {
        "device": {"type": "cpu", **host, "compute_dtype": "float32"},
        "source": f"{os.cpu_count()} CPU threads",
    }
    raw = {"schema": 1, "name": "detected", "host": host, "disk": {"reserve_gib": 10.0}, **found}
    how = "detected"
    if measure:
        raw["disk"].update(_measure_disk(folder or Path.cwd()))
        how = "measured" if _measure_device(raw, folder or Path.cwd()) else "disk measured"
    raw["source"] = f"{how} {datetime.date.today().isoformat()}, {raw['source']}"
    return profile_from_dict(raw, "detect")


def _gib(num_bytes: float) -> float:
    return num_bytes * 1000 // GIB / 1000


def _detect_cuda(host: dict[str, float]) -> dict[str, Any] | None:
    """`device`, `link` and `source` as the driver tells them, or None without an NVIDIA device.

    Raises ProfileError: memory unknown.
    """
    ask = open_nvml()
    if ask is None:
        return None
    name = ask("nvmlDeviceGetName") or "NVIDIA device"
    major, _ = ask("nvmlDeviceGetCudaComputeCapability") or (0, 0)
    device: dict[str, Any] = {"type": "cuda", "compute_dtype": "bfloat16" if major >= 8 else "float32"}
    memory = ask("nvmlDeviceGetMemoryInfo")
    total_bytes = memory.total if memory else 0
    if not memory:  # as on unified-memory parts
        with contextlib.suppress(ImportError):
            import torch

            if torch.cuda.is_available():
                total_bytes = torch.cuda.mem_get_info()[1]
                if torch.cuda.get_device_properties(0).is_integrated:
                    return {"device": {**device, **host, "unified": True}, "source": name}
    if not total_bytes:
        raise ProfileError(
            f"detect: neither NVML nor torch tells the memory of {name}; write a profile by hand and give its path"
        )
    lane = LANE_GIB_PER_S.get(ask("nvmlDeviceGetMaxPcieLinkGeneration"), 0)
    rate = (
        round(lane * (ask("nvmlDeviceGetMaxPcieLinkWidth") or 0) * LINK_FRACTION, 1) or LINK_UNKNOWN_GIB_PER_S
    )
    device |= {"memory_gib": _gib(total_bytes), "reserve_gib": _gib(total_bytes / 10)}
    return {"device": device, "link": dict.fromkeys(LinkSpec.model_fields, rate), "source": name}


def _measure_disk(folder: Path) -> dict[str, float]:
    """GiB/s of one large file without a name, past the page cache (no read rate where that is not possible).

    Raises ProfileError.
    """
    try:
        with (
            tempfile.TemporaryFile(dir=folder, buffering=0) as file,
            mmap.mmap(-1, min(MEASURE_BYTES, 8 * MIB)) as chunk,
        ):
            chunk[:] = os.urandom(
                len(chunk)
            )  # page-aligned, as O_DIRECT wants; random, so that nothing compresses it
            with contextlib.suppress(
                ImportError, AttributeError, OSError
            ):  # not every system and file system has O_DIRECT
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
            f"detect: no test file in {folder}: {found.strerror}; allowed: a folder to write {MEASURE_BYTES} bytes in"
        ) from None


_RUNTIME_CHILD = """
import sys, tempfile
from lowmem import job
from lowmem.reporting import report
from lowmem.machine.detect import detect_profile
small = ["model.num_layers=2", "model.dim=384", "model.num_heads=6", "blocks.num_blocks=2", "blocks.visit_steps=1", "optimizer.name=adamw"]
small += ["train.num_steps=2", "train.batch_size=8", "train.seq_len=128", "train.warmup_steps=0", "train.micro_batch_size=8"]
small += ["eval.num_batches=1", "eval.batch_size=1", "train.precision=float32"]
with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
    run = job.train("stdlib-causal", None, folder + "/run", small)
    content = report.read_report(run).content
predicted = content["predicted"]
print(content["measured"]["device_peak_bytes"] - predicted["device_peak_bytes"] + predicted["by_category"]["runtime_floor"])
"""


def _measure_device(raw: dict[str, Any], folder: Path) -> bool:
    """Adds peak_tflops, the memory's and the link's rates, and runtime_gib (a small run's peak less what it
    holds) to `raw`.

    False, and nothing added, where torch cannot use the device.
    """
    import torch

    device, cuda = raw["device"], raw["device"]["type"] == "cuda"
    if cuda and not torch.cuda.is_available():
        return False
    with contextlib.suppress(
        OSError, subprocess.SubprocessError, ValueError
    ):  # then RUNTIME_FLOOR_GIB stands
        child = subprocess.run(
            [sys.executable, "-c", _RUNTIME_CHILD, str(folder)],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        if int(child.stdout) >= LEAST_RUNTIME_BYTES:  # less: NVML tells no process's memory here
            device["runtime_gib"] = _gib(int(child.stdout))

    def best_s(run: Callable[[], object]) -> float:  # of 3, after one that warms up
        return min(timeit.repeat(lambda: (run(), cuda and torch.cuda.synchronize()), number=1, repeat=4)[1:])  # type: ignore[func-returns-value]

    size = MATMUL_SIZE[device["type"]]
    a = torch.randn(size, size, device=device["type"], dtype=getattr(torch, device["compute_dtype"]))
    device["peak_tflops"] = round(2 * size**3 / best_s(lambda: a @ a) / 1e12, 6)
    memory = [torch.ones(MEASURE_BYTES, dtype=torch.uint8, device=device["type"]) for _ in range(2)]
    device["memory_gib_per_s"] = round(
        2 * MEASURE_BYTES / GIB / best_s(lambda: memory[1].copy_(memory[0])), 2
    )
    with contextlib.suppress(
        RuntimeError
    ):  # pinned memory may be refused: then the link keeps its rule of thumb
        if "link" in raw:
            host = torch.ones(MEASURE_BYTES, dtype=torch.uint8, pin_memory=True)
            there = torch.empty_like(host, device="cuda")
            moves = {
                "host_to_device_gib_per_s": lambda: there.copy_(host, True),
                "device_to_host_gib_per_s": lambda: host.copy_(there, True),
            }
            raw["link"] = {key: round(MEASURE_BYTES / GIB / best_s(move), 2) for key, move in moves.items()}
    return True


def training_device(profile: Profile) -> torch.device:
    """The device to train on. Raises ProfileError if this machine has none of the profile's type."""
    kind = profile.device.type
    if kind == "mps":
        raise ProfileError(
            f"profile {profile.name}: training on device type 'mps' is not supported; use a cpu profile on this machine"
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise ProfileError(
            f"profile {profile.name}: needs a CUDA device and none is found here; use --dry-run, or a cpu profile (`lowmem profiles` lists them)"
        )
    return torch.device(kind)
