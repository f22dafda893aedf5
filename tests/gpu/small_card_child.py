"""Trains under the budget of a card of 8 GiB, in a process of its own. Prints what torch and NVML then say.

    python small_card_child.py RUN_FOLDER blocks|exact

`blocks`: independent blocks from disk. `exact`: seven billion parameters by exact back-propagation, from the
RAM of a host of 64 GiB.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_common import train_tokens

from lowmem.blocks.run_dir import RunDir
from lowmem.machine.monitor import NvmlReader, Sample
from lowmem.machine.profile import Profile, load_profile
from lowmem.reporting.telemetry import read_records


def main() -> None:
    folder, profile, began = Path(sys.argv[1]), load_profile("cuda-8gib-host-24gib"), time.perf_counter()
    if sys.argv[2] == "exact":
        profile = beside_a_large_host(profile)
        content = seven_billion(folder, profile)
    else:
        content = train_tokens(folder, profile, 4, 2048, 2, 2, {"tier": "disk"})
    sample = Sample(host_bytes=0)
    NvmlReader().fill(sample)
    refused = False
    try:
        torch.empty(profile.device_budget_bytes, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        refused = True
    run = RunDir(folder)
    records, state = list(read_records(run.telemetry_path)), run.read_state()
    assert state is not None
    figures = {
        "reserved": torch.cuda.max_memory_reserved(),
        "nvml": sample.nvml_process_bytes,
        "refused": refused,
        "planned": content["predicted"]["device_peak_bytes"],
        "measured": content["measured"]["device_peak_bytes"],
        "host_planned": content["predicted"]["host_peak_bytes"],
        "host_measured": content["measured"]["host_peak_bytes"],
        "losses": [record["loss"] for record in records if record["event"] == "step"],
        "step_s": [record["step_s"] for record in records if record["event"] == "step"],
        "bytes_at_rest": sum(record.num_bytes for record in state.files.values()),
        "wall_s": time.perf_counter() - began,
        "time": content["time"],
        "traffic": content["traffic"],
    }
    print(json.dumps(figures))


def beside_a_large_host(profile: Profile) -> Profile:
    host = {"memory_gib": 64.0, "reserve_gib": 8.0, "pinned_max_gib": 40.0}
    return profile.model_copy(update={"host": profile.host.model_copy(update=host)})


def seven_billion(folder: Path, profile: Profile) -> dict[str, Any]:
    """24 layers of width 4096, bf16 weights with stochastic rounding and 8-bit state: 4 bytes a parameter."""
    return train_tokens(
        folder,
        profile,
        24,
        4096,
        3,
        1,
        {"tier": "host", "borders": "host", "resident_layers": 0},
        method="end_to_end",
        train={"deterministic": False, "warmup_steps": 1, "recompute": True, "weights": "bfloat16"},
        optimizer={"grad_clip": None},
    )


if __name__ == "__main__":
    main()
