"""Describes a machine, as a profile in YAML: its memory, what of it is reserved, and its rates.

YAML has GiB and GiB/s (1 GiB = 1024^3 bytes); the properties are integers of bytes. A profile comes with the
package, from a user's file, or from `detect`. This module loads without torch, psutil and pynvml.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lowmem.errors import ProfileError
from lowmem.schema import Section, find_file, names_in, parse, read_yaml, yaml_text
from lowmem.units import GIB, from_gib

# Bounds that no machine reaches, so that a typing error is refused and arithmetic on bytes stays exact.
Gib = Annotated[float, Field(ge=0, le=2**20)]  # up to 1 PiB
Memory = Annotated[float, Field(ge=2**-10, le=2**20)]  # from 1 MiB on
Rate = Annotated[float, Field(ge=1e-6, le=1e6)]  # from 1 KiB/s to 1 PiB/s; 10^12 to 10^18 operations/s
DETECTED = "detected"  # the name of such a profile
CARDS = ("cuda", "xpu")  # types that have memory of their own
# What process and driver take before the first tensor.
RUNTIME_FLOOR_GIB = {"cpu": 0.162, "mps": 0.162, "cuda": 0.45, "xpu": 0.45}


class DeviceSpec(Section):
    type: Literal["cuda", "cpu", "mps", "xpu"]
    memory_gib: Memory
    reserve_gib: Gib = 0.0  # for the desktop, the system and other processes
    compute_dtype: Literal["float32", "bfloat16", "float16"]
    # 10^12 dense floating-point operations per second in compute_dtype
    peak_tflops: Rate | None = None
    memory_gib_per_s: Rate | None = None  # of the device's memory, read and written
    # taken before the first tensor; None: RUNTIME_FLOOR_GIB of the type
    runtime_gib: Gib | None = None
    unified: bool | None = None  # one memory for device and host; None: by type (all but cuda and xpu)


class HostSpec(Section):
    memory_gib: Memory
    reserve_gib: Gib
    pinned_max_gib: Gib = 0.5
    # with less left on the machine a run stops at its next commit; None: see `Profile.min_available_bytes`
    min_available_gib: Gib | None = None


class DiskSpec(Section):
    reserve_gib: Gib  # kept free
    read_gib_per_s: Rate | None = None
    write_gib_per_s: Rate | None = None


class LinkSpec(Section):
    host_to_device_gib_per_s: Rate
    device_to_host_gib_per_s: Rate


class Profile(Section):
    """A machine: what it has, and what of that a run may use."""

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
                raise ValueError(
                    f"{part}.reserve_gib: found {spec.reserve_gib}; "
                    f"allowed: below {part}.memory_gib = {spec.memory_gib}; lower it"
                )
        if device.type not in CARDS and device.unified is False:
            raise ValueError(
                f"device.unified: found false; a {device.type} device computes in the host's memory; "
                "remove the key"
            )
        if self.unified and (device.memory_gib, device.reserve_gib) != (host.memory_gib, host.reserve_gib):
            same = f"memory_gib: {device.memory_gib} and reserve_gib: {device.reserve_gib}"
            raise ValueError(
                f"host: found {host.memory_gib} and {host.reserve_gib}; "
                f"device and host are one memory here: set device's {same}"
            )
        if not self.unified and self.link is None:
            raise ValueError(
                f"key 'link' is missing; a {device.type} device needs its two rates in GiB/s: "
                "add it, or device.unified: true"
            )
        return self

    @property
    def unified(self) -> bool:
        """Tells whether device and host are one pool of memory; the two budgets are then the same one."""
        return self.device.type not in CARDS if self.device.unified is None else self.device.unified

    @property
    def is_detected(self) -> bool:
        """Whether it describes the machine that it was made on."""
        return self.name == DETECTED

    @property
    def device_budget_bytes(self) -> int:
        return from_gib(self.device.memory_gib) - from_gib(self.device.reserve_gib)

    @property
    def host_budget_bytes(self) -> int:
        return from_gib(self.host.memory_gib) - from_gib(self.host.reserve_gib)

    @property
    def runtime_floor_bytes(self) -> int:
        return from_gib(
            RUNTIME_FLOOR_GIB[self.device.type]
            if self.device.runtime_gib is None
            else self.device.runtime_gib
        )

    @property
    def pinned_max_bytes(self) -> int:
        return from_gib(self.host.pinned_max_gib)

    @property
    def min_available_bytes(self) -> int:
        """Memory that must be left on the machine while a run goes on.

        By default a quarter of the host's reserve, and at most 1 GiB: other programs have then used up the
        rest of the reserve.
        """
        host = self.host
        by_default = min(host.reserve_gib / 4, 1.0)
        return from_gib(by_default if host.min_available_gib is None else host.min_available_gib)

    @property
    def link_rates(self) -> tuple[float | None, float | None]:
        """Bytes per second to the device and from it; None: unknown, or nothing to cross."""
        if self.link is None:
            return None, None
        return self.link.host_to_device_gib_per_s * GIB, self.link.device_to_host_gib_per_s * GIB

    @property
    def disk_rates(self) -> tuple[float | None, float | None]:
        """Bytes per second read and written; None: unknown."""
        read, write = (
            (rate and rate * GIB) for rate in (self.disk.read_gib_per_s, self.disk.write_gib_per_s)
        )
        return read, write


def load_profile(name_or_path: str | os.PathLike[str]) -> Profile:
    """Loads the profile of that name or path.

    Raises ProfileError if the profile or a key is unknown, a type is wrong, or values contradict each other.
    """
    path = find_file(name_or_path, "hardware", "profile", ProfileError)
    return profile_from_dict(read_yaml(path, ProfileError), f"profile {path.stem}")


def profile_from_dict(raw: dict[str, Any], where: str) -> Profile:
    """Makes a profile of `raw`. `where` begins the message of the ProfileError that it may raise."""
    return parse(Profile, raw, where, ProfileError)


def profile_to_yaml(profile: Profile) -> str:
    raw = profile.model_dump(mode="json", by_alias=True, exclude_none=True)
    return yaml_text(raw)


def list_profiles() -> list[str]:
    return names_in("hardware")
