"""The monitor against real memory, NVML in its moods, and records that survive kills and threads."""

from __future__ import annotations

import json
import mmap
import os
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from lowmem.machine.monitor import Monitor, NvmlReader, Peak, Sample, anonymous_bytes, sample_fields
from lowmem.reporting.telemetry import Recorder, read_records
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


def test_a_device_peak_is_what_nvml_says_of_this_process_or_else_what_torch_holds() -> None:
    peak = Peak()
    peak.update(Sample(host_bytes=9, device_reserved_bytes=4), unified=False)
    assert (peak.device_bytes, peak.host_bytes) == (4, 9)
    peak.update(Sample(host_bytes=3, device_reserved_bytes=4, nvml_process_bytes=7), unified=False)
    assert (peak.device_bytes, peak.host_bytes) == (7, 9)


# ------------------------------------------------------------------------------------------------------------
# Records


def test_records_come_back_in_order_with_their_fields(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t.jsonl")
    recorder.write("open", pid=1)
    recorder.write("step", loss=0.5, text="ü\n")
    recorder.close()
    records = list(read_records(tmp_path / "t.jsonl"))
    assert [(r["event"], r.get("loss"), r.get("text")) for r in records] == [
        ("open", None, None),
        ("step", 0.5, "ü\n"),
    ]
    assert abs(records[0]["time"] - time.time()) < 60
    assert list(read_records(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize("torn", [b'{"event": "step", "lo', b'{"event": "st\xc3', b"12", b"{"])
def test_a_torn_last_line_is_passed_over_and_the_next_writer_begins_on_a_new_line(
    tmp_path: Path, torn: bytes
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"event": "open"}\n' + torn)
    assert [r["event"] for r in read_records(path)] == ["open"]
    recorder = Recorder(path)
    recorder.write("again")
    recorder.close()
    assert [r["event"] for r in read_records(path)] == ["open", "again"]
    assert path.read_bytes().startswith(b'{"event": "open"}\n' + torn + b"\n")


def test_a_whole_file_is_continued_without_an_empty_line(tmp_path: Path) -> None:
    for event in ("first", "second"):
        recorder = Recorder(tmp_path / "t.jsonl")
        recorder.write(event)
        recorder.close()
    lines = (tmp_path / "t.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["first", "second"]


def test_a_record_is_in_the_file_before_the_recorder_is_closed(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t.jsonl")
    recorder.write("step")
    assert [r["event"] for r in read_records(tmp_path / "t.jsonl")] == ["step"]
    recorder.close()


def test_lines_of_several_threads_never_interleave_and_listeners_get_them_in_the_files_order(
    tmp_path: Path,
) -> None:
    path, heard = tmp_path / "t.jsonl", list[dict[str, Any]]()
    recorder = Recorder(path)
    recorder.listeners.append(heard.append)

    def write(thread: int) -> None:
        for number in range(150):
            recorder.write("step", thread=thread, number=number, filler="x" * 5000)

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == heard
    assert sorted((r["thread"], r["number"]) for r in lines) == [(t, n) for t in range(4) for n in range(150)]
