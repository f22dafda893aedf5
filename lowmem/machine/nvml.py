"""TODO module docstring."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from typing import Any


def open_nvml() -> Callable[..., Any] | None:
    """`ask(call, ...)` of the first visible NVIDIA device, None where that call is not answered; None without
    driver or device.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = (
            nvml.nvmlDeviceGetHandleByIndex(int(visible))
            if visible.isdigit()
            else nvml.nvmlDeviceGetHandleByUUID(visible)
        )
    except Exception:  # no package, library, driver, permission or device: all mean none to use
        return None

    def ask(call: str, *given: Any) -> Any:
        with contextlib.suppress(nvml.NVMLError, AttributeError):
            return getattr(nvml, call)(handle, *given)

    return ask
