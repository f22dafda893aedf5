"""Machine profiles: the packaged ones, and strict reading."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowmem.errors import ProfileError
from lowmem.machine.profile import (
    RUNTIME_FLOOR_GIB,
    list_profiles,
    load_profile,
    profile_from_dict,
    profile_to_yaml,
)
from lowmem.schema import profiles_dir
from lowmem.units import GIB

EXPECTED = [
    "apple-m2-16gb",
    "cpu-16gib",
    "cpu-3gib",
    "cpu-4gib",
    "cpu-4gib-limit",
    "cpu-8gib",
    "cuda-8gib-host-24gib",
    "gtx-1650-4gb",
    "h200-141gb",
    "jetson-orin-nano-8gb",
    "rtx-3050ti-laptop-4gb",
    "rtx-3060-12gb",
    "rtx-3090-24gb",
    "rtx-4060-laptop-8gb",
    "rtx-4070-laptop-8gb",
    "rtx-4090-24gb",
    "t4-16gb",
    "wsl2-rtx-4060-laptop-8gb",
]


def raw_profile(name: str = "rtx-4060-laptop-8gb") -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load((profiles_dir("hardware") / f"{name}.yaml").read_text())
    return raw


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ProfileError) as caught:
        profile_from_dict(raw, "profile test")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("profile test: ")
    return message


# ---- packaged profiles


def test_the_packaged_profiles_are_the_promised_ones() -> None:
    assert list_profiles() == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_packaged_profile_loads_and_is_complete(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.source
    assert 0 < profile.runtime_floor_bytes < profile.device_budget_bytes
    assert 0 < profile.pinned_max_bytes < profile.host_budget_bytes
    assert profile.disk.read_gib_per_s and profile.disk.write_gib_per_s
    assert profile.unified == (profile.link is None)
    assert profile_from_dict(yaml.safe_load(profile_to_yaml(profile)), "again") == profile


@pytest.mark.parametrize("name", EXPECTED)
def test_a_packaged_profile_says_where_each_number_comes_from(name: str) -> None:
    schema, *lines = (profiles_dir("hardware") / f"{name}.yaml").read_text().splitlines()
    assert schema == "schema: 1"
    numbers = [line for line in lines if re.search(r"_gib|tflops", line)]
    assert numbers and all("  # " in line for line in numbers)
    assert all(len(line) <= 150 and "G" + "B" not in line for line in lines)


def test_budgets_are_whole_bytes_of_memory_minus_reserve() -> None:
    profile = load_profile("rtx-4060-laptop-8gb")
    assert (profile.device_budget_bytes, profile.host_budget_bytes, profile.pinned_max_bytes) == (
        7 * GIB,
        12 * GIB,
        GIB // 2,
    )
    assert profile.runtime_floor_bytes == round(0.45 * GIB)
    assert not profile.unified


def test_a_unified_profile_has_one_budget() -> None:
    for name in ("cpu-8gib", "apple-m2-16gb", "jetson-orin-nano-8gb"):
        profile = load_profile(name)
        assert profile.unified and profile.device_budget_bytes == profile.host_budget_bytes


def test_a_stated_runtime_replaces_the_constant() -> None:
    raw = raw_profile("cpu-8gib")
    assert profile_from_dict(raw, "test").runtime_floor_bytes == round(RUNTIME_FLOOR_GIB["cpu"] * GIB)
    raw["device"]["runtime_gib"] = 0.125
    assert profile_from_dict(raw, "test").runtime_floor_bytes == GIB // 8


def test_a_profile_loads_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(profile_to_yaml(load_profile("t4-16gb")))
    assert load_profile(path) == load_profile("t4-16gb")


# ---- what is refused


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(
        ProfileError,
        match=r"^profile: unknown name 'rtx-4060-laptop-8g'; did you mean 'rtx-4060-laptop-8gb'\?.*cpu-4gib",
    ):
        load_profile("rtx-4060-laptop-8g")


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ProfileError, match="no file 'none.yaml'"):
        load_profile("none.yaml")


def test_an_unknown_key_is_refused_with_the_nearest_one() -> None:
    raw = raw_profile()
    raw["device"]["memory_gb"] = 8
    assert "unknown key 'device.memory_gb'; did you mean 'memory_gib'?" in refusal(raw)


def test_an_unknown_dtype_or_type_is_refused_with_the_nearest_one() -> None:
    raw = raw_profile()
    raw["device"]["compute_dtype"] = "bfloat"
    assert "device.compute_dtype: unknown name 'bfloat'; did you mean 'bfloat16'?" in refusal(raw)
    raw = raw_profile()
    raw["device"]["type"] = "cuda0"
    assert "device.type: unknown name 'cuda0'; did you mean 'cuda'?" in refusal(raw)


@pytest.mark.parametrize("part", ["device", "host"])
def test_a_reserve_that_leaves_nothing_is_refused(part: str) -> None:
    raw = raw_profile()
    raw[part]["reserve_gib"] = raw[part]["memory_gib"]
    assert (
        f"{part}.reserve_gib: found {raw[part]['memory_gib']}; allowed: below {part}.memory_gib"
        in refusal(raw)
    )


def test_a_cuda_device_without_link_is_refused() -> None:
    raw = raw_profile()
    del raw["link"]
    assert "key 'link' is missing" in refusal(raw)


@pytest.mark.parametrize("key", ["memory_gib", "reserve_gib"])
def test_two_sizes_of_one_unified_memory_are_refused(key: str) -> None:
    raw = raw_profile("cpu-8gib")
    raw["host"][key] -= 0.5
    assert (
        "device and host are one memory here: set device's memory_gib: 8.0 and reserve_gib: 2.0"
        in refusal(raw)
    )


def test_a_cpu_device_with_its_own_memory_is_refused() -> None:
    raw = raw_profile("cpu-8gib")
    raw["device"]["unified"] = False
    assert "device.unified: found false" in refusal(raw)


def test_negative_and_infinite_amounts_are_refused() -> None:
    for value in (-1.0, float("inf")):
        raw = raw_profile()
        raw["host"]["reserve_gib"] = value
        assert "host.reserve_gib: found" in refusal(raw)


def test_importing_the_module_does_not_load_torch_or_the_probes() -> None:
    code = (
        "import sys, lowmem.machine.profile as profile; profile.load_profile('cpu-4gib'); "
        "print([name for name in ('torch', 'pynvml', 'psutil') if name in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"
