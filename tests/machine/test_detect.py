"""This machine as a profile: detection with and without a driver, and measuring."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from lowmem.errors import ProfileError
from lowmem.machine import detect, memory
from lowmem.machine import device as device_module
from lowmem.machine.detect import detect_profile
from lowmem.machine.device import CardFacts
from lowmem.machine.profile import Profile, profile_from_dict, profile_to_yaml
from lowmem.units import GIB, MIB

CALLS: dict[str, Any] = {
    "nvmlDeviceGetName": "NVIDIA Test Card",
    "nvmlDeviceGetCudaComputeCapability": (8, 9),
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=8 * GIB, used=GIB),
    "nvmlDeviceGetMaxPcieLinkGeneration": 4,
    "nvmlDeviceGetMaxPcieLinkWidth": 8,
}


class FakeNvmlError(Exception):
    pass


def fake_nvml(driver: bool = True, **answers: Any) -> Any:
    """A `pynvml` with one device that answers CALLS, changed by `answers`; None there: the call raises, as
    NotSupported does.
    """
    module: Any = ModuleType("pynvml")
    module.NVMLError = FakeNvmlError

    def init() -> None:
        if not driver:
            raise FakeNvmlError("Driver Not Loaded")

    def by_index(index: int) -> str:
        if index > 0:
            raise FakeNvmlError("Invalid Argument")
        return "handle"

    def by_uuid(uuid: str) -> str:
        if uuid != "GPU-1":
            raise FakeNvmlError("Not Found")
        return "handle"

    def caller(answer: Any) -> Any:
        def call(handle: str) -> Any:
            assert handle == "handle"
            if answer is None:
                raise FakeNvmlError("Not Supported")
            return answer

        return call

    module.nvmlInit, module.nvmlDeviceGetHandleByIndex, module.nvmlDeviceGetHandleByUUID = (
        init,
        by_index,
        by_uuid,
    )
    for name, answer in {**CALLS, **answers}.items():
        setattr(module, name, caller(answer))
    return module


def torch_says(monkeypatch: pytest.MonkeyPatch, total_bytes: int, integrated: bool = False) -> None:
    """As if torch saw a CUDA card."""
    facts = CardFacts("Test Card", total_bytes, (8, 6), integrated)
    monkeypatch.setattr(device_module, "cuda_facts", lambda: facts)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same machine for every test: 16 GiB, no driver, no memory cgroup."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GIB, available=13 * GIB))
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(driver=False))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(memory, "CGROUP_FILE", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CGROUP_ROOT", tmp_path / "sys")


def assert_round_trip(profile: Profile) -> None:
    assert profile_from_dict(yaml.safe_load(profile_to_yaml(profile)), "again") == profile


# ---- detection


def test_without_a_driver_the_device_is_the_processor() -> None:
    profile = detect_profile()
    assert (profile.name, profile.device.type, profile.device.compute_dtype) == ("detected", "cpu", "float32")
    assert profile.device_budget_bytes == profile.host_budget_bytes == 12 * GIB
    assert re.fullmatch(r"detected \d{4}-\d\d-\d\d, .*", profile.source)
    assert_round_trip(profile)


def test_what_other_programs_hold_now_is_reserved_where_it_is_more_than_a_quarter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GIB, available=5 * GIB))
    assert detect_profile().host_budget_bytes == pytest.approx(5 * GIB, abs=GIB / 1000)
    (tmp_path / "cgroup").write_text("0::/box\n")
    (tmp_path / "sys" / "box").mkdir(parents=True)
    for name, text in {
        "memory.max": f"{8 * GIB}",
        "memory.current": f"{7 * GIB}",
        "memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
    }.items():
        (tmp_path / "sys" / "box" / name).write_text(text)
    assert memory.available_bytes() == 3 * GIB
    assert detect_profile().host_budget_bytes == pytest.approx(3 * GIB, abs=GIB / 1000)


def test_detection_works_on_the_real_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert_round_trip(detect_profile())


def test_without_the_nvml_package_the_device_is_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert detect_profile().device.type == "cpu"


@pytest.mark.parametrize(
    ("line", "files", "gib"),
    [
        ("0::/box/job", {"box/job/memory.max": "4294967296"}, 4),
        ("0::/box/job", {"box/job/memory.max": "max", "box/memory.max": "2147483648"}, 2),
        ("0::/box/job", {"box/job/memory.max": "8589934592", "memory.max": "3221225472"}, 3),
        ("0::/../other", {"memory.max": "4294967296"}, 4),
        ("4:cpu,memory:/box", {"memory/box/memory.limit_in_bytes": "4294967296"}, 4),
        ("4:memory:/not/mounted/here", {"memory/memory.limit_in_bytes": "2147483648"}, 2),
        ("4:memory:/box", {"memory/box/memory.limit_in_bytes": "9223372036854771712"}, 16),
        ("3:cpuset:/box", {"memory/box/memory.limit_in_bytes": "4294967296"}, 16),
    ],
)
def test_the_smallest_cgroup_limit_is_honoured(
    tmp_path: Path, line: str, files: dict[str, str], gib: int
) -> None:
    (tmp_path / "cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    for name, text in files.items():
        (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / name).write_text(text + "\n")
    assert detect_profile().device.memory_gib == gib


def test_an_nvidia_device_is_described_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    profile = detect_profile()
    assert (
        profile.device.type,
        profile.device.compute_dtype,
        profile.device.memory_gib,
        profile.device.reserve_gib,
    ) == ("cuda", "bfloat16", 8, 0.8)
    assert (
        profile.link
        and profile.link.host_to_device_gib_per_s == profile.link.device_to_host_gib_per_s == 11.7
    )  # 80 % of 4.0 x8
    assert profile.host.memory_gib == 16
    assert "NVIDIA Test Card" in profile.source
    assert_round_trip(profile)


@pytest.mark.parametrize("call", [call for call in CALLS if call != "nvmlDeviceGetMemoryInfo"])
def test_one_failing_driver_call_costs_only_its_own_answer(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(True, **{call: None}))
    profile = detect_profile()
    assert profile.device.memory_gib == 8
    assert profile.device.compute_dtype == ("float32" if "Capability" in call else "bfloat16")
    assert profile.link and profile.link.host_to_device_gib_per_s == (12.0 if "Pcie" in call else 11.7)


def test_a_device_before_compute_capability_8_gets_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetCudaComputeCapability=(7, 5)))
    assert detect_profile().device.compute_dtype == "float32"


def test_unified_memory_that_nvml_does_not_support_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetMemoryInfo=None))
    torch_says(monkeypatch, 15 * GIB, integrated=True)
    profile = detect_profile()
    assert profile.device.type == "cuda" and profile.unified and profile.link is None
    assert profile.device_budget_bytes == profile.host_budget_bytes == 12 * GIB
    assert_round_trip(profile)


def test_memory_that_nvml_does_not_tell_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetMemoryInfo=None))
    torch_says(monkeypatch, 6 * GIB)
    profile = detect_profile()
    assert profile.device.memory_gib == 6 and not profile.unified and profile.link


def test_a_card_that_only_torch_sees_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver library, as in some containers and on ROCm: the run must not train on the CPU in silence."""
    torch_says(monkeypatch, 12 * GIB)
    profile = detect_profile()
    assert (profile.device.type, profile.device.compute_dtype) == ("cuda", "bfloat16")
    assert profile.device.memory_gib == 12 and profile.link and "Test Card" in profile.source
    assert_round_trip(profile)


@pytest.mark.parametrize("no_torch", [True, False], ids=["without torch", "torch without CUDA"])
def test_memory_that_nobody_tells_is_an_error(monkeypatch: pytest.MonkeyPatch, no_torch: bool) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetMemoryInfo=None))
    if no_torch:
        monkeypatch.setitem(sys.modules, "lowmem.machine.device", None)
    with pytest.raises(ProfileError, match="memory of NVIDIA Test Card; write a profile by hand"):
        detect_profile()


@pytest.mark.parametrize(
    ("visible", "found"), [("0,1", "cuda"), ("GPU-1", "cuda"), ("", "cpu"), ("-1", "cpu"), ("3", "cpu")]
)
def test_hidden_devices_stay_hidden(monkeypatch: pytest.MonkeyPatch, visible: str, found: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert detect_profile().device.type == found


# ---- measuring


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "MEASURE_BYTES", MIB)
    monkeypatch.setattr(detect, "MATMUL_SIZE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(detect, "RUNTIME_PROBE", ("-c", f"print({GIB // 4})"))


def test_measuring_adds_rates_and_leaves_no_file(tmp_path: Path, small: None) -> None:
    (tmp_path / "disk").mkdir()
    profile = detect_profile(measure=True, folder=tmp_path / "disk")
    assert list((tmp_path / "disk").iterdir()) == []
    assert profile.disk.write_gib_per_s and profile.device.peak_tflops
    assert (profile.disk.read_gib_per_s is not None) == sys.platform.startswith("linux")
    assert profile.device.runtime_gib == 0.25
    assert re.fullmatch(r"measured \d{4}-\d\d-\d\d, .*", profile.source)
    assert_round_trip(profile)


def test_measuring_in_a_folder_that_is_not_there_is_refused(tmp_path: Path, small: None) -> None:
    with pytest.raises(
        ProfileError,
        match=r"^detect: no test file in .*none: No such file or directory; "
        r"allowed: a folder to write 1048576 bytes",
    ):
        detect_profile(measure=True, folder=tmp_path / "none")


def test_a_runtime_that_cannot_be_measured_keeps_the_constant(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, "RUNTIME_PROBE", ("-c", "raise SystemExit(1)"))
    assert detect_profile(measure=True, folder=tmp_path).device.runtime_gib is None


def test_a_device_that_torch_cannot_use_is_not_called_measured(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    monkeypatch.setattr(device_module, "cuda_works", lambda: False)
    profile = detect_profile(measure=True, folder=tmp_path)
    assert profile.source.startswith("disk measured ") and profile.device.peak_tflops is None


def test_the_runtime_of_a_real_child_is_plausible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.run(
        [sys.executable, *detect.RUNTIME_PROBE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 32 * MIB < int(child.stdout) < 4 * GIB
