"""Trains under the budget of a small card in a process of its own. Prints what torch and NVML then say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gpu_common import train_tokens

from lowmem.machine.monitor import NvmlReader, Sample
from lowmem.machine.profile import load_profile


def main() -> None:
    profile = load_profile("cuda-8gib-host-24gib")
    content = train_tokens(Path(sys.argv[1]), profile, 4, 2048, 2, 2, {"tier": "disk"})
    sample = Sample(host_bytes=0)
    NvmlReader().fill(sample)
    refused = False
    try:
        torch.empty(profile.device_budget_bytes, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        refused = True
    figures = {
        "reserved": torch.cuda.max_memory_reserved(),
        "nvml": sample.nvml_process_bytes,
        "refused": refused,
        "planned": content["predicted"]["device_peak_bytes"],
        "measured": content["measured"]["device_peak_bytes"],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
