"""Tells how well a run hides the moving of blocks behind compute, and what to change where it does not.

Blocks move beside compute: the next one is read and the last one written while one trains. What takes longer
than compute is exposed: compute waits for it.
"""

from __future__ import annotations

import math
from typing import Any

from lowmem.blocks.run_dir import RunState

WORTH_SHARE = 0.05  # of compute: less waiting than this is not worth a change
WAYS = ("host_to_device", "device_to_host", "disk_read", "disk_written")


def moving_figures(plan: dict[str, Any], state: RunState) -> dict[str, Any]:
    """What moving blocks cost: waiting against compute, the rates of link and disk, and what to change."""
    steps = sum(block.steps for block in state.blocks)
    moved = {
        way: (getattr(state.traffic, f"{way}_bytes"), getattr(state.transfer_s, f"{way}_s")) for way in WAYS
    }
    compute_s = state.time.get("compute_s", 0.0)
    exposed_s = state.time.get("exposed_transfer_s", 0.0) + state.time.get("commit_s", 0.0)
    share = exposed_s / compute_s if compute_s else None
    moving_s = sum(seconds for _, seconds in moved.values())

    def a_step(*ways: str) -> float | None:
        return sum(moved[way][0] for way in ways) / steps if steps else None

    return {
        "compute_s": compute_s,
        "exposed_s": exposed_s,  # waiting for blocks to arrive, and for the last ones to be written
        "exposed_share": share,
        **{
            f"{way}_bytes_per_s": num_bytes / seconds if seconds else None
            for way, (num_bytes, seconds) in moved.items()
        },
        "link_bytes_per_step": a_step("host_to_device", "device_to_host"),
        "disk_read_bytes_per_step": a_step("disk_read"),
        "disk_written_bytes_per_step": a_step("disk_written"),  # wears the drive
        "advice": None if share is None else _advice(plan, state, share, moving_s / compute_s),
    }


def _advice(plan: dict[str, Any], state: RunState, waiting: float, moving: float) -> str | None:
    """What to change, in one sentence; None where nothing is to be gained.

    `waiting` for blocks, `moving` blocks: each as a share of compute.
    """
    recipe, settings = plan["recipe"], plan["settings"]
    if waiting <= WORTH_SHARE:
        return None
    found = f"waiting is {waiting:.1%} of compute"
    if settings["write_back"] == "wait" and recipe["method"] != "end_to_end":
        return (
            f"{found}: set offload.write_back: beside, so that a block is written while the next one trains"
        )
    if settings["tier"] != "device" and not recipe["offload"]["prefetch"]:
        return f"{found}: set offload.prefetch: true, so that a block is read while the last one trains"
    steps = recipe["blocks"]["visit_steps"]
    enough = max(steps + 1, math.ceil(steps * moving))
    cures = []
    if steps < recipe["train"]["num_steps"]:
        cures.append(f"raise blocks.visit_steps from {steps} to {enough}, or the tokens of a step as much")
    on_cpu = plan["profile"]["device"]["type"] == "cpu"
    if settings["optimizer"] == "adamw" and not on_cpu:  # on a CPU 8-bit state costs more time than it saves
        cures.append("take optimizer.name: adamw8bit (half the bytes of a block)")
    room = plan["budget"]["host_bytes"] - plan["predicted"]["host_peak_bytes"]
    if settings["tier"] == "disk" and room > sum(record.num_bytes for record in state.files.values()):
        cures.append(f"keep blocks in RAM (offload.tier: {'device' if on_cpu else 'host'})")
    return f"{found}: {'; or '.join(cures)}" if cures else None
