"""Records the versions and the hardware of this machine, for reports and bug reports.

It asks for versions without importing the packages, so that looking costs no time and changes nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import psutil

PACKAGES = (
    "torch",
    "bitsandbytes",
    "deepspeed",
    "psutil",
    "nvidia-ml-py",
    "safetensors",
    "xxhash",
    "numpy",
    "pydantic",
    "PyYAML",
    "rich",
    "typer",
    "filelock",
    "jinja2",
    "matplotlib",
)


def read_environment() -> dict[str, Any]:
    """Versions by package (None: not installed), the system, its memory in bytes, and its GPUs' names."""
    return {
        "lowmem": _version("lowmem"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor_cores": os.cpu_count(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "gpus": _gpus(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    try:
        import pynvml

        pynvml.nvmlInit()
        return [
            str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)))
            for i in range(pynvml.nvmlDeviceGetCount())
        ]
    except Exception:  # no driver, or one that fails in a way of its own
        return []
