"""Exact back-propagation streamed layer by layer on a CUDA device: its time beside a resident model's, and
seven billion parameters on a card of 8 GiB.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from gpu_common import SEQ_LEN, VOCAB, needs_cuda, record, train_tokens, uncounted_activations  # noqa: F401

from lowmem.blocks.run_dir import RunDir
from lowmem.machine.profile import Profile
from lowmem.reporting.telemetry import read_records
from lowmem.units import GIB, MIB

ROOT = Path(__file__).parents[2]
pytestmark = needs_cuda


@pytest.mark.usefixtures("uncounted_activations")
@pytest.mark.parametrize("batch_size", [8, 64])
def test_a_streamed_step_has_the_resident_digest_and_its_time_is_recorded(
    tmp_path: Path, profile: Profile, batch_size: int
) -> None:
    """bf16 weights. From RAM that is page-locked, with no layer that stays, and with every second one."""
    step_s: dict[str, float] = {}
    peak: dict[str, float] = {}
    digests, depth, steps = set(), 4, 6
    arms: dict[str, dict[str, Any]] = {
        "resident": {"tier": "device"},
        "streamed": {"tier": "host", "resident_layers": 0},
        "half_stays": {"tier": "host", "resident_layers": depth // 2},
    }
    for name, offload in arms.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        content = train_tokens(
            tmp_path / name,
            profile,
            depth,
            2048,
            steps,
            1,
            offload,
            batch_size,
            method="end_to_end",
            train={"recompute": True, "weights": "bfloat16", "warmup_steps": 1},
            optimizer={"grad_clip": None},
        )
        records = read_records(RunDir(tmp_path / name).telemetry_path)
        times = [event["step_s"] for event in records if event["event"] == "step"]
        step_s[name] = sum(times[2:-1]) / len(times[2:-1])  # the first set up, the last commits
        peak[name] = torch.cuda.max_memory_reserved() / MIB
        digests.add(content["digest"])
        shutil.rmtree(tmp_path / name)
    record(
        f"exact step, {batch_size * SEQ_LEN} tokens",
        **{f"{name}_ms": 1000 * value for name, value in step_s.items()},
        **{f"{name}_mib": value for name, value in peak.items()},
        streamed_ratio=step_s["streamed"] / step_s["resident"],
        half_stays_ratio=step_s["half_stays"] / step_s["resident"],
    )
    assert len(digests) == 1 and None not in digests


def test_seven_billion_parameters_train_exactly_on_an_emulated_card_of_8_gib(tmp_path: Path) -> None:
    """On a machine whose disk is too small, LOWMEM_GPU_FOLDER names another place for the run's files."""
    folder = Path(os.environ.get("LOWMEM_GPU_FOLDER", tmp_path)) / "seven-billion"
    if psutil.virtual_memory().available < 100 * GIB or shutil.disk_usage(folder.parent).free < 90 * GIB:
        pytest.skip("it takes 30 GiB of RAM and 84 GiB of disk (100 GiB of RAM, where that is the disk)")
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), *sys.path])
    child = Path(__file__).parent / "small_card_child.py"
    try:
        done = subprocess.run(
            [sys.executable, str(child), str(folder), "exact"],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    gib = {name: (found[name] or 0) / GIB for name in ("reserved", "nvml", "planned", "measured")}
    record(
        "seven billion parameters, exact, card of 8 GiB",
        **{f"{name}_gib": value for name, value in gib.items()},
        at_rest_gib=found["bytes_at_rest"] / GIB,
        host_planned_gib=found["host_planned"] / GIB,
        host_measured_gib=found["host_measured"] / GIB,
        losses=found["losses"],
        step_s=found["step_s"],
        wall_s=found["wall_s"],
        refused=found["refused"],
    )
    assert found["refused"], "more than the card holds was given"
    assert max(found["reserved"], found["nvml"] or 0) <= 7.5 * GIB
    assert all(abs(loss - math.log(VOCAB)) < 2 for loss in found["losses"]), (
        "random tokens of that many kinds"
    )
