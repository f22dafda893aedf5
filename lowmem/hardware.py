"""A machine in YAML: memory, reserves, rates. Profiles that come with the package, and one of the machine at hand.

GiB and GiB/s in YAML (1 GiB = 1024^3 bytes), integer bytes in the properties. This module loads without torch, psutil and pynvml.
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
from typing import Any, Literal

import yaml
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from lowmem.errors import ProfileError
from lowmem.strict import Section, find_file, names_in, parse, read_yaml
from lowmem.units import GIB, MIB, from_gib

RUNTIME_FLOOR_GIB = {"cpu": 0.241, "mps": 0.241, "cuda": 0.45}  # process and driver, before the first tensor
LANE_GIB_PER_S = {1: 0.233, 2: 0.466, 3: 0.917, 4: 1.834, 5: 3.668, 6: 7.043}  # PCIe generation: one lane, one direction, in theory
LINK_FRACTION, LINK_UNKNOWN_GIB_PER_S = 0.8, 12.0  # what a pinned copy reaches, of the theoretical rate; the rate where NVML does not tell
MEASURE_BYTES = 256 * MIB
LEAST_RUNTIME_BYTES = 32 * MIB
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


class DeviceSpec(Section):
    type: Literal["cuda", "cpu", "mps"]
    memory_gib: PositiveFloat
    reserve_gib: NonNegativeFloat = 0.0  # for the desktop, the system and other processes
    compute_dtype: Literal["float32", "bfloat16", "float16"]
    peak_tflops: PositiveFloat | None = None  # 10^12 dense floating-point operations per second in compute_dtype
    memory_gib_per_s: PositiveFloat | None = None  # of the device's memory, read and written
    runtime_gib: NonNegativeFloat | None = None  # taken before the first tensor; None: RUNTIME_FLOOR_GIB of the type
    unified: bool | None = None  # one memory for device and host; None: by type (all but cuda)


class HostSpec(Section):
    memory_gib: PositiveFloat
    reserve_gib: NonNegativeFloat
    pinned_max_gib: NonNegativeFloat = 0.5
    min_available_gib: NonNegativeFloat | None = None  # with less left on the machine a run stops at its next commit; None: see min_available_bytes


class DiskSpec(Section):
    reserve_gib: NonNegativeFloat  # kept free
    read_gib_per_s: PositiveFloat | None = None
    write_gib_per_s: PositiveFloat | None = None


class LinkSpec(Section):
    host_to_device_gib_per_s: PositiveFloat
    device_to_host_gib_per_s: PositiveFloat


class Profile(Section):
    schema_version: Literal[1] = Field(alias="schema")
    name: str = Field(min_length=1)
    device: DeviceSpec
    host: HostSpec
    disk: DiskSpec
    link: LinkSpec | None = None  # None: unified memory, nothing to cross
    source: str = Field(min_length=1)  # "data sheet", "measured 2026-11-23, ..."

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
        device, host = self.device, self.host
        for part, spec in (("device", device), ("host", host)):
            if spec.reserve_gib >= spec.memory_gib:
                raise ValueError(f"{part}.reserve_gib: found {spec.reserve_gib}; allowed: below {part}.memory_gib = {spec.memory_gib}; lower it")
        if device.type != "cuda" and device.unified is False:
            raise ValueError(f"device.unified: found false; a {device.type} device computes in the host's memory; remove the key")
        if self.unified and (device.memory_gib, device.reserve_gib) != (host.memory_gib, host.reserve_gib):
            same = f"memory_gib: {device.memory_gib} and reserve_gib: {device.reserve_gib}"
            raise ValueError(f"host: found {host.memory_gib} and {host.reserve_gib}; device and host are one memory here: set device's {same}")
        if not self.unified and self.link is None:
            raise ValueError("key 'link' is missing; a cuda device needs its two rates in GiB/s: add it, or device.unified: true")
        return self

    @property
    def unified(self) -> bool:
        """Whether device and host are one pool of memory (then the two budgets are one and the same)."""
        return self.device.type != "cuda" if self.device.unified is None else self.device.unified

    @property
    def device_budget_bytes(self) -> int:
        return from_gib(self.device.memory_gib) - from_gib(self.device.reserve_gib)

    @property
    def host_budget_bytes(self) -> int:
        return from_gib(self.host.memory_gib) - from_gib(self.host.reserve_gib)

    @property
    def runtime_floor_bytes(self) -> int:
        return from_gib(RUNTIME_FLOOR_GIB[self.device.type] if self.device.runtime_gib is None else self.device.runtime_gib)

    @property
    def pinned_max_bytes(self) -> int:
        return from_gib(self.host.pinned_max_gib)

    @property
    def min_available_bytes(self) -> int:
        """A quarter of the host's reserve, at most 1 GiB, where the profile does not say: the rest of the machine has then used up the others."""
        host = self.host
        return from_gib(min(host.reserve_gib / 4, 1.0) if host.min_available_gib is None else host.min_available_gib)

    @property
    def link_rates(self) -> tuple[float | None, float | None]:
        """Bytes per second to the device and from it; None: unknown, or nothing to cross."""
        link = self.link
        return (None, None) if link is None else (link.host_to_device_gib_per_s * GIB, link.device_to_host_gib_per_s * GIB)

    @property
    def disk_rates(self) -> tuple[float | None, float | None]:
        """Bytes per second read and written."""
        read, write = ((rate and rate * GIB) for rate in (self.disk.read_gib_per_s, self.disk.write_gib_per_s))
        return read, write


def load_profile(name_or_path: str | os.PathLike[str]) -> Profile:
    """The profile of that name or path. Raises ProfileError: unknown profile or key, wrong type, or values that contradict each other."""
    path = find_file(name_or_path, "hardware", "profile", ProfileError)
    return profile_from_dict(read_yaml(path, ProfileError), f"profile {path.stem}")


def profile_from_dict(raw: dict[str, Any], where: str) -> Profile:
    """`raw` as a profile; `where` begins the message of the ProfileError it may raise."""
    return parse(Profile, raw, where, ProfileError)


def profile_to_yaml(profile: Profile) -> str:
    raw = profile.model_dump(mode="json", by_alias=True, exclude_none=True)
    return yaml.safe_dump(raw, sort_keys=False, default_flow_style=None, width=150)


def list_profiles() -> list[str]:
    return names_in("hardware")


def detect_profile(measure: bool = False, folder: Path | None = None) -> Profile:
    """A profile of this machine, named `detected`; `measure` adds rates (`folder`: on the disk to measure; None: the working folder).

    Raises ProfileError: neither driver nor torch tells the device's memory, or `folder` cannot be written.
    """
    from lowmem import cgroup  # psutil

    host_bytes = cgroup.total_bytes()
    in_use = host_bytes - cgroup.available_bytes()  # by others: this process has hardly begun
    host = {"memory_gib": _gib(host_bytes), "reserve_gib": _gib(max(host_bytes / 4, in_use))}
    found = _detect_cuda(host) or {"device": {"type": "cpu", **host, "compute_dtype": "float32"}, "source": f"{os.cpu_count()} CPU threads"}
    raw = {"schema": 1, "name": "detected", "host": host, "disk": {"reserve_gib": 10.0}, **found}
    how = "detected"
    if measure:
        raw["disk"].update(_measure_disk(folder or Path.cwd()))
        how = "measured" if _measure_device(raw, folder or Path.cwd()) else "disk measured"
    raw["source"] = f"{how} {datetime.date.today().isoformat()}, {raw['source']}"
    return profile_from_dict(raw, "detect")


def _gib(num_bytes: float) -> float:
    return num_bytes * 1000 // GIB / 1000


def open_nvml() -> Callable[..., Any] | None:
    """`ask(call, ...)` of the first visible NVIDIA device, None where that call is not answered; None without driver or device."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(int(visible)) if visible.isdigit() else nvml.nvmlDeviceGetHandleByUUID(visible)
    except Exception:  # no package, library, driver, permission or device: all mean none to use
        return None

    def ask(call: str, *given: Any) -> Any:
        with contextlib.suppress(nvml.NVMLError, AttributeError):
            return getattr(nvml, call)(handle, *given)

    return ask


def _detect_cuda(host: dict[str, float]) -> dict[str, Any] | None:
    """`device`, `link` and `source` as the driver tells them, or None without an NVIDIA device. Raises ProfileError: memory unknown."""
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
        raise ProfileError(f"detect: neither NVML nor torch tells the memory of {name}; write a profile by hand and give its path")
    lane = LANE_GIB_PER_S.get(ask("nvmlDeviceGetMaxPcieLinkGeneration"), 0)
    rate = round(lane * (ask("nvmlDeviceGetMaxPcieLinkWidth") or 0) * LINK_FRACTION, 1) or LINK_UNKNOWN_GIB_PER_S
    device |= {"memory_gib": _gib(total_bytes), "reserve_gib": _gib(total_bytes / 10)}
    return {"device": device, "link": dict.fromkeys(LinkSpec.model_fields, rate), "source": name}


def _measure_disk(folder: Path) -> dict[str, float]:
    """GiB/s of one large file without a name, past the page cache (no read rate where that is not possible). Raises ProfileError."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file, mmap.mmap(-1, min(MEASURE_BYTES, 8 * MIB)) as chunk:
            chunk[:] = os.urandom(len(chunk))  # page-aligned, as O_DIRECT wants; random, so that nothing compresses it
            with contextlib.suppress(ImportError, AttributeError, OSError):  # not every system and file system has O_DIRECT
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
        raise ProfileError(f"detect: no test file in {folder}: {found.strerror}; allowed: a folder to write {MEASURE_BYTES} bytes in") from None


_RUNTIME_CHILD = """
import sys, tempfile
from lowmem import job, report
from lowmem.hardware import detect_profile
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
    """Adds peak_tflops, the memory's and the link's rates, and runtime_gib (a small run's peak less what it holds) to `raw`.

    False, and nothing added, where torch cannot use the device.
    """
    import torch

    device, cuda = raw["device"], raw["device"]["type"] == "cuda"
    if cuda and not torch.cuda.is_available():
        return False
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):  # then RUNTIME_FLOOR_GIB stands
        child = subprocess.run([sys.executable, "-c", _RUNTIME_CHILD, str(folder)], capture_output=True, text=True, timeout=300, check=True)
        if int(child.stdout) >= LEAST_RUNTIME_BYTES:  # less: NVML tells no process's memory here
            device["runtime_gib"] = _gib(int(child.stdout))

    def best_s(run: Callable[[], object]) -> float:  # of 3, after one that warms up
        return min(timeit.repeat(lambda: (run(), cuda and torch.cuda.synchronize()), number=1, repeat=4)[1:])  # type: ignore[func-returns-value]

    size = MATMUL_SIZE[device["type"]]
    a = torch.randn(size, size, device=device["type"], dtype=getattr(torch, device["compute_dtype"]))
    device["peak_tflops"] = round(2 * size**3 / best_s(lambda: a @ a) / 1e12, 6)
    memory = [torch.ones(MEASURE_BYTES, dtype=torch.uint8, device=device["type"]) for _ in range(2)]
    device["memory_gib_per_s"] = round(2 * MEASURE_BYTES / GIB / best_s(lambda: memory[1].copy_(memory[0])), 2)
    with contextlib.suppress(RuntimeError):  # pinned memory may be refused: then the link keeps its rule of thumb
        if "link" in raw:
            host = torch.ones(MEASURE_BYTES, dtype=torch.uint8, pin_memory=True)
            there = torch.empty_like(host, device="cuda")
            moves = {"host_to_device_gib_per_s": lambda: there.copy_(host, True), "device_to_host_gib_per_s": lambda: host.copy_(there, True)}
            raw["link"] = {key: round(MEASURE_BYTES / GIB / best_s(move), 2) for key, move in moves.items()}
    return True
