"""Asks NVIDIA's management library (NVML) about the first visible device, where there is one.

NVML tells a card's memory without starting CUDA, and it sees what torch's allocator does not. No package, no
driver, no device and calls that a device does not support are all ordinary cases, not errors.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from typing import Any


def open_nvml(uuid: str | None = None) -> Callable[..., Any] | None:
    """Returns `ask(name of the call, its arguments...)`, or None where there is no device to ask.

    `ask` returns None if the device does not answer that call. `uuid`: the card that CUDA uses. CUDA and NVML
    do not number cards in the same order, so without it the guess may be wrong where there are several.
    """
    visible = uuid or os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = (
            nvml.nvmlDeviceGetHandleByIndex(int(visible))
            if visible.isdigit()
            else nvml.nvmlDeviceGetHandleByUUID(visible)
        )
    except (
        Exception
    ):  # no package, library, driver, permission or device: each means that there is none to use
        return None

    def ask(call: str, *given: Any) -> Any:
        with contextlib.suppress(nvml.NVMLError, AttributeError):
            return getattr(nvml, call)(handle, *given)

    return ask
