"""TODO module docstring."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import asdict, dataclass, replace

import psutil

from lowmem.machine.memory import available_bytes
from lowmem.machine.nvml import open_nvml

SAMPLE_PERIOD_S = 0.02


SYSTEM_SAMPLES = 25  # the machine's own figures change slowly: read them once in so many samples


CHILDREN_SAMPLES = 500  # to find children, all processes of the machine are read


@dataclass
class Sample:
    """Bytes at one moment; None where the machine cannot tell."""

    host_bytes: int  # this process, anonymous resident
    host_available_bytes: int | None = None  # the machine, before it swaps
    device_allocated_bytes: int | None = None  # torch's tensors on the device
    device_reserved_bytes: int | None = None  # held by torch's allocator
    nvml_used_bytes: int | None = None  # the whole card, all processes
    nvml_process_bytes: int | None = None
    children_bytes: int | None = None  # anonymous resident, of this process's children: loaders, compilers
    device_alloc_retries: int | None = (
        None  # times that torch's allocator gave back its cache to serve a request
    )
    temperature_c: int | None = None  # of the card, degrees Celsius
    power_w: float | None = None


@dataclass
class Peak:
    device_bytes: int = 0
    host_bytes: int = 0

    def update(self, sample: Sample, unified: bool) -> None:
        device = (
            sample.host_bytes
            if unified
            else max(sample.nvml_process_bytes or 0, sample.device_reserved_bytes or 0)
        )
        self.device_bytes = max(self.device_bytes, device)
        self.host_bytes = max(self.host_bytes, sample.host_bytes)


def anonymous_bytes(process: psutil.Process) -> int:
    memory = process.memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def _of_child(child: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return anonymous_bytes(child)
    return 0  # it has ended meanwhile


class NvmlReader:
    """The memory of the first visible card through NVML, or nothing at all: no driver, no card and
    unsupported calls are all ordinary.
    """

    def __init__(self) -> None:
        self._ask = open_nvml()

    def fill(self, sample: Sample) -> None:
        if self._ask is None:
            return
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        sample.nvml_used_bytes = memory and int(memory.used)
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses") or []
        own = [
            process.usedGpuMemory
            for process in processes
            if process.pid == os.getpid() and process.usedGpuMemory
        ]
        sample.nvml_process_bytes = int(own[0]) if own else None
        sample.temperature_c = self._ask("nvmlDeviceGetTemperature", 0)  # 0: of the chip
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        sample.power_w = None if milliwatts is None else milliwatts / 1000


class Monitor:
    """Samples memory until stopped; `peak` since the last `take_peak()`, `run_peak` since the start."""

    def __init__(self, unified: bool) -> None:
        self.unified = unified
        self._process = psutil.Process()
        self._nvml = None if unified else NvmlReader()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._count = 0
        self.last = Sample(host_bytes=anonymous_bytes(self._process))
        self.peak, self.run_peak = Peak(), Peak()
        self._thread = threading.Thread(target=self._run, name="lowmem-monitor", daemon=True)

    def __enter__(self) -> Monitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def sample(self) -> Sample:
        """One reading now, counted in the peaks.

        Also called by the trainer where memory is highest, after each forward pass.
        """
        with self._lock:
            sample = replace(self.last, host_bytes=anonymous_bytes(self._process))
            if self._count % SYSTEM_SAMPLES == 0:
                sample.host_available_bytes = available_bytes()
            if self._count % CHILDREN_SAMPLES == 0:
                sample.children_bytes = sum(map(_of_child, self._process.children(recursive=True)))
            if not self.unified:
                self._fill_device(sample)
            self._count += 1
            self.last = sample
            self.peak.update(sample, self.unified)
            self.run_peak.update(sample, self.unified)
            return sample

    def take_peak(self) -> Peak:
        """The peak since the last call, and a new count from here."""
        self.sample()
        with self._lock:
            peak, self.peak = self.peak, Peak()
            return peak

    def _fill_device(self, sample: Sample) -> None:
        import torch

        sample.device_allocated_bytes = int(torch.cuda.memory_allocated())
        sample.device_reserved_bytes = int(torch.cuda.memory_reserved())
        sample.device_alloc_retries = int(torch.cuda.memory_stats().get("num_alloc_retries", 0))
        if self._nvml is not None and self._count % SYSTEM_SAMPLES == 0:
            self._nvml.fill(sample)

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_PERIOD_S):
            self.sample()


def sample_fields(sample: Sample) -> dict[str, float]:
    """The readings that exist, for a record."""
    return {name: value for name, value in asdict(sample).items() if value is not None}
