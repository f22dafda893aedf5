"""Watches how much memory the process takes, and keeps the peaks.

A thread reads the figures many times a second. They have three sources: psutil (the process and the machine),
torch's allocator, and NVML (the card and every process on it). The device's figures are optional: each NVML
call may fail on its own, as on unified memory, which reports NOT_SUPPORTED. What cannot be read is None,
never 0.

The host's figure is anonymous resident memory: resident pages without shared ones and pages of files. A
memory limit kills for anonymous pages, because the kernel can drop the others.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil

from lowmem.machine.memory import available_bytes
from lowmem.machine.nvml import open_nvml

if TYPE_CHECKING:  # readers of a run folder load this module without torch
    from lowmem.machine.device import Device

SAMPLE_PERIOD_S = 0.02
SYSTEM_SAMPLES = 25  # the machine's own figures change slowly: one sample in so many reads them
CHILDREN_SAMPLES = 500  # psutil finds children by reading every process of the machine, which takes long


@dataclass
class Sample:
    """What was read at one moment, in bytes unless named otherwise; None where the machine cannot tell."""

    host_bytes: int  # anonymous resident memory of this process
    host_available_bytes: int | None = None  # what the machine can still give before it swaps
    device_allocated_bytes: int | None = None  # torch's tensors on the device
    device_reserved_bytes: int | None = None  # held by torch's allocator
    nvml_used_bytes: int | None = None  # the whole card, all processes
    nvml_process_bytes: int | None = None  # this process on the card
    children_bytes: int | None = None  # anonymous resident memory of child processes: loaders, compilers
    device_alloc_retries: int | None = None  # times that torch's allocator emptied its cache for a request
    temperature_c: int | None = None  # of the card, degrees Celsius
    power_w: float | None = None


def device_bytes(reading: Mapping[str, Any], unified: bool) -> int:
    """The bytes of a reading that count as the device's, against its budget.

    `reading`: the fields of a Sample, or a telemetry record, which leaves out what could not be read.
    `unified`: device and host are one memory, so the process's own memory counts. Elsewhere it is what NVML
    says of the process, or what torch's allocator holds where that is more: NVML may not tell processes
    apart, and it is read less often.
    """
    if unified:
        return int(reading.get("host_bytes") or 0)
    return max(
        int(reading.get("nvml_process_bytes") or 0),
        int(reading.get("device_reserved_bytes") or 0),
    )


@dataclass
class Peak:
    """The most bytes seen on the device and on the host, each on its own."""

    device_bytes: int = 0
    host_bytes: int = 0

    def update(self, sample: Sample, unified: bool) -> None:
        self.device_bytes = max(self.device_bytes, device_bytes(vars(sample), unified))
        self.host_bytes = max(self.host_bytes, sample.host_bytes)


def anonymous_bytes(process: psutil.Process) -> int:
    """Resident bytes of a process that no file backs. Raises psutil.Error if the process is gone."""
    memory = process.memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def _child_bytes(child: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return anonymous_bytes(child)
    return 0  # the child has ended since it was found


class NvmlReader:
    """Reads a card through NVML: that of the UUID, or the first visible one. Without one it reads nothing."""

    def __init__(self, uuid: str | None = None) -> None:
        self._ask = open_nvml(uuid)

    def fill(self, sample: Sample) -> None:
        """Writes the card's figures into `sample`; a figure that NVML refuses becomes None."""
        if self._ask is None:
            return
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        sample.nvml_used_bytes = memory and int(memory.used)
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses") or []
        own = [
            process.usedGpuMemory
            for process in processes
            if process.pid == os.getpid() and process.usedGpuMemory  # None on Windows and WSL
        ]
        sample.nvml_process_bytes = int(own[0]) if own else None
        sample.temperature_c = self._ask("nvmlDeviceGetTemperature", 0)  # sensor 0: the chip
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        sample.power_w = None if milliwatts is None else milliwatts / 1000


class Monitor:
    """Samples memory on its own thread while the `with` block runs.

    `peak` holds the most since the last `take_peak()`, `run_peak` the most since the start, `last` the latest
    sample. `unified`: device and host are one memory, so no card is read.
    """

    def __init__(self, unified: bool, device: Device | None = None) -> None:
        """`device`: the one that trains, where it has memory of its own."""
        self.unified = unified
        self._process = psutil.Process()
        self._device = None if unified else device
        self._nvml = None if unified else NvmlReader(None if device is None else device.uuid())
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
        """Reads now and counts the reading in the peaks.

        The trainer calls it too, after each forward pass: memory is highest there, but only for a moment.
        """
        with self._lock:
            sample = replace(self.last, host_bytes=anonymous_bytes(self._process))
            if self._count % SYSTEM_SAMPLES == 0:
                sample.host_available_bytes = available_bytes()
            if self._count % CHILDREN_SAMPLES == 0:
                sample.children_bytes = sum(map(_child_bytes, self._process.children(recursive=True)))
            if not self.unified:
                self._fill_device(sample)
            self._count += 1
            self.last = sample
            self.peak.update(sample, self.unified)
            self.run_peak.update(sample, self.unified)
            return sample

    def take_peak(self) -> Peak:
        """Returns the peak since the last call, and starts a new one."""
        self.sample()
        with self._lock:
            peak, self.peak = self.peak, Peak()
            return peak

    def _fill_device(self, sample: Sample) -> None:
        held = self._device and self._device.memory()
        if held:
            sample.device_allocated_bytes, sample.device_reserved_bytes = held.allocated, held.reserved
            sample.device_alloc_retries = held.retries
        if self._nvml is not None and self._count % SYSTEM_SAMPLES == 0:
            self._nvml.fill(sample)

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_PERIOD_S):
            self.sample()


def sample_fields(sample: Sample) -> dict[str, float]:
    """The readings that exist, by name, for a telemetry record."""
    return {name: value for name, value in asdict(sample).items() if value is not None}
