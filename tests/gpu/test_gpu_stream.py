"""Streaming on a CUDA device: the same bits in about the same time, flat memory, small cards emulated, copies
under compute.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_common import needs_cuda, record, train_tokens, uncounted_activations  # noqa: F401
from racing import race, race_plan

from lowmem.blocks.run_dir import RunDir
from lowmem.blocks.staging import RING_CHUNKS
from lowmem.machine.device import Cuda
from lowmem.machine.monitor import NvmlReader, Sample
from lowmem.machine.profile import Profile, load_profile
from lowmem.reporting.telemetry import read_records
from lowmem.units import GIB, MIB

ROOT = Path(__file__).parents[2]
pytestmark = needs_cuda


def visited(folder: Path) -> list[dict[str, Any]]:
    return [event for event in read_records(RunDir(folder).telemetry_path) if event["event"] == "visited"]


def staging(folder: Path) -> dict[str, Any]:
    return next(event for event in read_records(RunDir(folder).telemetry_path) if event["event"] == "staging")


def with_link(profile: Profile, gib_per_s: float) -> Profile:
    rates = dict.fromkeys(("host_to_device_gib_per_s", "device_to_host_gib_per_s"), gib_per_s)
    return profile.model_copy(update={"link": profile.link.model_copy(update=rates)})  # type: ignore[union-attr]


def nvml_process_bytes() -> int | None:
    sample = Sample(host_bytes=0)
    NvmlReader().fill(sample)
    return sample.nvml_process_bytes


@pytest.mark.parametrize("visit_steps", [4, 32])
def test_streamed_steps_give_the_resident_digest_and_their_time_is_recorded(
    tmp_path: Path, profile: Profile, visit_steps: int
) -> None:
    """Rounds take turns; the first of each run is a warm-up.

    Times are for the table, digests are the claim.
    """
    blocks, rounds = 4, 3
    digests, step_s, exposed = set(), {}, {}
    for tier in ("device", "host", "disk", "device"):  # the first again at the end: what the order does
        folder = tmp_path / tier
        shutil.rmtree(folder, ignore_errors=True)
        content = train_tokens(folder, profile, blocks, 2048, visit_steps, rounds, {"tier": tier})
        events = visited(folder)
        steps = (rounds - 1) * blocks * visit_steps
        step_s.setdefault(tier, []).append((events[-1]["total_s"] - events[blocks - 1]["total_s"]) / steps)
        waits = [events[i]["exposed_transfer_s"] + events[i]["commit_s"] for i in (blocks - 1, -1)]
        exposed[tier] = (waits[1] - waits[0]) / ((rounds - 1) * blocks)
        digests.add(content["digest"])
        rates = {
            name: value for name, value in content["stream"].items() if name.endswith("bytes_per_s") and value
        }
        record(
            f"stream, {tier}, {visit_steps} steps a visit",
            **{name: value / GIB for name, value in rates.items()},
            exposed_s_per_visit=exposed[tier],
        )
    resident = sum(step_s["device"]) / 2
    ratios = {f"{tier}_ratio": step_s[tier][0] / resident for tier in ("host", "disk")}
    spread = max(step_s["device"]) / min(step_s["device"]) - 1
    record(
        f"step time / resident, {visit_steps} steps a visit",
        **ratios,
        resident_step_s=resident,
        resident_spread=spread,
    )
    assert len(digests) == 1


def test_the_peak_is_flat_in_depth(tmp_path: Path, profile: Profile) -> None:
    reserved, nvml = {}, {}
    for depth in (4, 4, 8, 16):  # the first once more: what is made once in a process is there by then
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        train_tokens(tmp_path / str(depth), profile, depth, 1024, 2, 2, {"tier": "disk"})
        reserved[depth], nvml[depth] = torch.cuda.max_memory_reserved(), nvml_process_bytes()
        shutil.rmtree(tmp_path / str(depth))
    spread = max(reserved.values()) / min(reserved.values()) - 1
    record(
        "peak over 4, 8, 16 blocks",
        **{f"reserved_mib_{d}": v / MIB for d, v in reserved.items()},
        spread=spread,
    )
    known = {f"nvml_mib_{d}": v / MIB for d, v in nvml.items() if v}
    record("NVML process memory over 4, 8, 16 blocks", readable=len(known), **known)
    assert spread <= 0.01
    assert not known or max(known.values()) / min(known.values()) <= 1.01


def test_a_small_card_is_emulated_on_a_large_one(tmp_path: Path) -> None:
    card = load_profile("cuda-8gib-host-24gib")
    if torch.cuda.get_device_properties(0).total_memory <= card.device_budget_bytes:
        pytest.skip("this card is no larger")
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), *sys.path])
    child = Path(__file__).parent / "small_card_child.py"
    command = [sys.executable, str(child), str(tmp_path / "run"), "blocks"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    record(
        "8 GiB card emulated",
        **{f"{name}_gib": (found[name] or 0) / GIB for name in ("reserved", "nvml", "planned", "measured")},
        refused=found["refused"],
    )
    assert found["refused"], "more than the card holds was given"
    assert max(found["reserved"], found["nvml"] or 0) <= card.device_budget_bytes


def test_a_paced_link_takes_at_least_its_time_and_changes_no_bit(tmp_path: Path, profile: Profile) -> None:
    free = train_tokens(tmp_path / "free", profile, 3, 1024, 2, 2, {"tier": "host"})
    paced = train_tokens(
        tmp_path / "paced", with_link(profile, 0.5), 3, 1024, 2, 2, {"tier": "host", "pace": True}
    )
    rates = {
        f"{name}_gib_per_s": arm["stream"]["host_to_device_bytes_per_s"] / GIB
        for name, arm in (("free", free), ("paced", paced))
    }
    record("link, to the device", **rates)
    assert paced["digest"] == free["digest"]
    assert paced["stream"]["host_to_device_bytes_per_s"] <= 0.5 * GIB * 1.001
    assert paced["stream"]["device_to_host_bytes_per_s"] <= 0.5 * GIB * 1.001


# ------------------------------------------------------------------------------------------------------------
# The ring


@pytest.mark.usefixtures("uncounted_activations")
def test_a_refused_page_lock_leaves_the_bits_alone(
    tmp_path: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests, facts, lock = set(), {}, Cuda.locked
    for name, count in {"all": 99, "two": 2, "none": 0}.items():
        left = iter(range(count))
        monkeypatch.setattr(
            Cuda, "locked", lambda self, size, left=left: next((lock(self, size) for _ in left), None)
        )
        digests.add(train_tokens(tmp_path / name, profile, 3, 1024, 2, 2, {"tier": "disk"})["digest"])
        facts[name] = staging(tmp_path / name)
    record(
        "ring",
        **{
            name: f"{fact['chunks']} x {fact['chunk_bytes'] // MIB} MiB, {fact['locked_bytes'] // MIB} locked"
            for name, fact in facts.items()
        },
    )
    assert len(digests) == 1
    assert (
        facts["all"]["locked_bytes"] == RING_CHUNKS * facts["all"]["chunk_bytes"] <= profile.pinned_max_bytes
    )
    assert facts["two"]["chunks"] == 2 and facts["none"]["locked_bytes"] == 0


# ------------------------------------------------------------------------------------------------------------
# Races and traces


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_copies_that_compute_outruns_still_bring_the_right_bytes_50_times(
    tmp_path: Path, profile: Profile, tier: str
) -> None:
    rows, steps = 40_000, 2
    expected = race(tmp_path / "resident", race_plan(profile, 3, rows, steps, tier="device"), rows)
    plan = race_plan(profile, 3, rows, steps, tier=tier, prefetch=True, write_back="beside")
    same = 0
    for _ in range(50):
        same += race(tmp_path / "run", plan, rows) == expected
        shutil.rmtree(tmp_path / "run")
    record(f"race, {tier}", runs=50, same_digest=same)
    assert same == 50


def overlap_us(copies: list[tuple[float, float]], kernels: list[tuple[float, float]]) -> float:
    """Microseconds of the copies during which some kernel ran; both are (start, end)."""
    total, merged = 0.0, []
    for start, end in sorted(kernels):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    for copy_start, copy_end in copies:
        total += sum(max(0.0, min(copy_end, end) - max(copy_start, start)) for start, end in merged)
    return total


def test_a_trace_shows_copies_under_compute_and_no_wait_for_the_device_within_a_visit(
    tmp_path: Path, profile: Profile
) -> None:
    """The trace itself is kept beside the suite's results where LOWMEM_RESULTS names a folder."""
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as profiler

    marks: list[Any] = []

    def mark(event: dict[str, Any]) -> None:
        """One span from the end of a visit's first step to the end of its last: what lies within must not
        wait.
        """
        if event["event"] == "step" and event["step"] % 16 == 0:
            marks.append(record_function("steps of a visit"))
            marks[-1].__enter__()
        if event["event"] == "step" and event["step"] % 16 == 15:
            marks[-1].__exit__(None, None, None)

    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as trace:
        train_tokens(tmp_path / "run", profile, 3, 2048, 16, 2, {"tier": "host"}, listeners=[mark])
    path = tmp_path / "trace.json"
    trace.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    spans = [
        (e["ts"], e["ts"] + e["dur"], e["tid"])
        for e in events
        if e["name"] == "steps of a visit" and e.get("cat") == "user_annotation"
    ]
    kernels = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel"]
    copies = [
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("cat") == "gpu_memcpy" and e.get("args", {}).get("bytes", 0) >= MIB
    ]
    waits = [
        e["name"]
        for e in events
        if e["name"] in ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
        and any(start <= e["ts"] <= end and e["tid"] == thread for start, end, thread in spans)
    ]
    copied_us = sum(end - start for start, end in copies)
    hidden = overlap_us(copies, kernels) / copied_us
    record(
        "trace",
        visits=len(spans),
        copies=len(copies),
        copied_ms=copied_us / 1000,
        under_compute=hidden,
        waits_between_steps=len(waits),
    )
    if os.environ.get("LOWMEM_RESULTS"):
        shutil.copy(path, Path(os.environ["LOWMEM_RESULTS"]) / "gpu_trace.json")
    assert spans and copies and hidden > 0
    assert waits == []


def test_the_bench_runs_on_the_device(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "bench"),
        "--quick",
        "--arms",
        "host",
        "disk",
        "--run-dir",
        str(tmp_path / "runs"),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    record(
        "bench --quick",
        **{f"{row['arm']}_ratio": row["step_ratio"] for row in found["steps"]},
        depth_spread=found["depth_spread"],
    )
    assert {row["arm"] for row in found["steps"]} == {"host", "disk"}
