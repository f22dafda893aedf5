"""The monitor against real memory, and NVML in its moods."""

from __future__ import annotations

import mmap
import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from lowmem.machine.monitor import (
    Monitor,
    NvmlReader,
    Peak,
    Sample,
    anonymous_bytes,
    device_bytes,
    sample_fields,
)
from lowmem.units import MIB


def hold(num_bytes: int, seconds: float) -> None:
    touched = np.ones(num_bytes, dtype=np.uint8)
    time.sleep(seconds)
    del touched


def test_the_peak_catches_a_short_lived_allocation_and_the_next_peak_starts_anew() -> None:
    with Monitor(unified=True) as monitor:
        before = monitor.take_peak().host_bytes
        hold(200 * MIB, 0.2)
        peak = monitor.take_peak()
        after = monitor.take_peak()
    assert 190 * MIB < peak.host_bytes - before < 260 * MIB
    assert peak.device_bytes == peak.host_bytes  # unified: one memory
    assert after.host_bytes < peak.host_bytes - 150 * MIB
    assert monitor.run_peak.host_bytes >= peak.host_bytes


def test_the_monitor_ends_its_thread() -> None:
    with Monitor(unified=True) as monitor:
        assert monitor._thread.is_alive()
    assert not monitor._thread.is_alive()


def test_a_reading_has_the_machines_available_memory_from_the_first_on() -> None:
    monitor = Monitor(unified=True)
    available = [monitor.sample().host_available_bytes for _ in range(3)]
    assert all(value is not None and 0 < value < psutil.virtual_memory().total for value in available)


def test_anonymous_bytes_do_not_count_the_pages_of_a_mapped_file(tmp_path: Path) -> None:
    process, path = psutil.Process(), tmp_path / "mapped"
    path.write_bytes(os.urandom(MIB) * 64)
    before, before_rss = anonymous_bytes(process), process.memory_info().rss
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        touched = sum(mapped[position] for position in range(0, 64 * MIB, 4096))
        assert touched > 0
        assert process.memory_info().rss - before_rss > 48 * MIB
        assert abs(anonymous_bytes(process) - before) < 16 * MIB


# ------------------------------------------------------------------------------------------------------------
# NVML


class FakeNvmlError(Exception):
    pass


class FakeNotSupported(FakeNvmlError):
    pass


def fake_nvml(**answers: Any) -> ModuleType:
    """A `pynvml` with one card and this process on it; an answer that is an exception is raised."""
    module: Any = ModuleType("pynvml")
    module.NVMLError = FakeNvmlError
    own, other = (
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=300 * MIB),
        SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=900 * MIB),
    )
    usual = {
        "nvmlInit": None,
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=1300 * MIB),
        "nvmlDeviceGetComputeRunningProcesses": [other, own],
    }

    def answer(value: Any) -> Any:
        def call(*_: object) -> Any:
            if isinstance(value, Exception):
                raise value
            return value

        return call

    for name, value in {**usual, **answers}.items():
        setattr(module, name, answer(value))
    return module


def nvml_reading(monkeypatch: pytest.MonkeyPatch, module: ModuleType | None) -> tuple[int | None, int | None]:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    sample = Sample(host_bytes=1)
    NvmlReader().fill(sample)
    return sample.nvml_used_bytes, sample.nvml_process_bytes


def only_process(**fields: Any) -> dict[str, Any]:
    return {
        "nvmlDeviceGetComputeRunningProcesses": [
            SimpleNamespace(**{"pid": os.getpid(), "usedGpuMemory": 1, **fields})
        ]
    }


def test_nvml_tells_the_card_and_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nvml_reading(monkeypatch, fake_nvml()) == (1300 * MIB, 300 * MIB)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"nvmlInit": FakeNvmlError("driver not loaded")}, (None, None)),
        ({"nvmlInit": OSError("no library")}, (None, None)),
        ({"nvmlDeviceGetHandleByIndex": FakeNvmlError("no such card")}, (None, None)),
        ({"nvmlDeviceGetMemoryInfo": FakeNotSupported()}, (None, 300 * MIB)),
        ({"nvmlDeviceGetComputeRunningProcesses": FakeNvmlError("lost")}, (1300 * MIB, None)),
        (
            {
                "nvmlDeviceGetMemoryInfo": FakeNotSupported(),
                "nvmlDeviceGetComputeRunningProcesses": FakeNotSupported(),
            },
            (None, None),
        ),
        ({"nvmlDeviceGetComputeRunningProcesses": []}, (1300 * MIB, None)),
        (only_process(usedGpuMemory=None), (1300 * MIB, None)),  # as on Windows and WSL
        (only_process(pid=os.getpid() + 1), (1300 * MIB, None)),
    ],
)
def test_what_nvml_cannot_tell_is_none(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], expected: tuple[int | None, int | None]
) -> None:
    assert nvml_reading(monkeypatch, fake_nvml(**answers)) == expected


def test_without_pynvml_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nvml_reading(monkeypatch, None) == (None, None)


def test_a_record_holds_only_the_readings_that_exist() -> None:
    assert sample_fields(Sample(host_bytes=5, device_reserved_bytes=0)) == {
        "host_bytes": 5,
        "device_reserved_bytes": 0,
    }


def test_the_devices_bytes_are_the_larger_of_what_nvml_and_torch_say_of_the_process() -> None:
    assert device_bytes({"host_bytes": 9, "device_reserved_bytes": 4}, unified=False) == 4
    assert device_bytes({"host_bytes": 9, "nvml_process_bytes": 7}, unified=False) == 7
    both = {"host_bytes": 9, "device_reserved_bytes": 4, "nvml_process_bytes": 7}
    assert device_bytes(both, unified=False) == 7
    assert device_bytes({**both, "device_reserved_bytes": 8}, unified=False) == 8  # NVML is read less often
    assert device_bytes({"host_bytes": 9, "nvml_process_bytes": None}, unified=False) == 0


def test_the_devices_bytes_on_unified_memory_are_the_processs_own_whatever_the_card_says() -> None:
    reading = {"host_bytes": 9, "device_reserved_bytes": 4, "nvml_process_bytes": 20}
    assert device_bytes(reading, unified=True) == 9
    assert device_bytes({}, unified=True) == 0


@pytest.mark.parametrize("unified", [True, False])
def test_a_peak_counts_the_bytes_of_the_one_definition_and_never_falls(unified: bool) -> None:
    samples = [
        Sample(host_bytes=9, device_reserved_bytes=4),
        Sample(host_bytes=3, device_reserved_bytes=4, nvml_process_bytes=7),
        Sample(host_bytes=1),
    ]
    peak = Peak()
    for sample in samples:
        peak.update(sample, unified)
    expected = max(device_bytes(sample_fields(sample), unified) for sample in samples)
    assert (peak.device_bytes, peak.host_bytes) == (expected, 9)
    assert expected == (9 if unified else 7)
