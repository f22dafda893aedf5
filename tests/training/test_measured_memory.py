"""Check 9: memory, measured in processes of their own after every block has had optimizer state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SETTINGS = [
    "model.num_layers=8",
    "model.dim=256",
    "model.patch_size=1",
    "blocks.num_blocks=4",
    "blocks.visit_steps=2",
    "train.num_steps=2",
    "train.warmup_steps=0",
    "train.micro_batch_size=64",
    "optimizer.name=adamw",
    "eval.num_batches=1",
    "eval.batch_size=16",
]


def report_of(folder: Path, recipe: str, *settings: str) -> dict[str, Any]:
    arguments = [
        sys.executable,
        "-m",
        "lowmem",
        "train",
        recipe,
        "--profile",
        "cpu-16gib",
        "--run-dir",
        str(folder),
        "--json",
        "--quiet",
    ]
    for setting in [*SETTINGS, *settings]:
        arguments += ["--set", setting]
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_check_9_blocks_take_less_than_end_to_end_even_with_recompute_and_as_much_as_planned(
    tmp_path: Path,
) -> None:
    arms = {
        "blocks": report_of(tmp_path / "blocks", "digits-vit", "offload.tier=disk", "train.recompute=false"),
        "recompute": report_of(tmp_path / "recompute", "digits-vit-end-to-end", "train.recompute=true"),
        "whole": report_of(tmp_path / "whole", "digits-vit-end-to-end", "train.recompute=false"),
    }
    measured = {name: arm["measured"]["device_peak_bytes"] for name, arm in arms.items()}
    assert measured["blocks"] < measured["whole"]
    assert measured["recompute"] < measured["whole"]
    assert all(block["steps"] == 2 for block in arms["blocks"]["blocks"]), "every block has optimizer state"
    for arm in arms.values():
        assert 0.85 < arm["measured"]["device_peak_bytes"] / arm["predicted"]["device_peak_bytes"] < 1.1


@pytest.mark.slow
def test_bf16_weights_and_updates_during_backward_take_what_is_planned_and_less(tmp_path: Path) -> None:
    """Wide layers on few samples: weights, gradients and state are what counts."""
    wide = [
        "model.dim=1024",
        "model.num_layers=4",
        "train.micro_batch_size=auto",
        "train.batch_size=4",
        "train.precision=bfloat16",
    ]
    wide += ["optimizer.grad_clip=null", "offload.tier=device", "train.recompute=false"]
    arms = {
        "plain": ["optimizer.during_backward=false"],
        "during backward": [],
        "bf16 weights": ["optimizer.during_backward=false", "train.weights=bfloat16"],
        "both": ["train.weights=bfloat16"],
    }
    reports = {
        name: report_of(tmp_path / name, "digits-vit-end-to-end", *wide, *settings)
        for name, settings in arms.items()
    }
    planned, measured = (
        {name: report[kind]["device_peak_bytes"] for name, report in reports.items()}
        for kind in ("predicted", "measured")
    )
    for name in arms:
        assert 0.85 < measured[name] / planned[name] < 1.1, name
        if name != "plain":
            saved, foreseen = measured["plain"] - measured[name], planned["plain"] - planned[name]
            assert saved > 0.8 * foreseen > 0, name


@pytest.mark.slow
def test_a_sweep_takes_and_moves_what_is_planned(tmp_path: Path) -> None:
    size = ["blocks.visit_steps=8", "train.num_steps=8", "blocks.sweep_steps=4", "offload.resident_layers=0"]
    report = report_of(
        tmp_path, "digits-vit-end-to-end", *size, "offload.tier=disk", "offload.borders=device"
    )
    measured, planned = (report[kind]["device_peak_bytes"] for kind in ("measured", "predicted"))
    assert measured == pytest.approx(planned, rel=0.05)
    assert report["traffic"] == report["predicted"]["traffic"]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["device", "disk", "again"])
def test_blocks_trained_by_the_whole_models_gradients_take_and_move_what_is_planned(
    tmp_path: Path, arm: str
) -> None:
    away = [f"offload.tier={'device' if arm == 'device' else 'disk'}", "train.recompute=false"]
    size = ["method=block_coordinate", "blocks.visit_steps=4", "train.num_steps=4", *away]
    again = ["blocks.visit_batches=2", "offload.borders=device"] if arm == "again" else []
    report = report_of(tmp_path, "digits-vit-end-to-end", *size, *again)
    measured, planned = (report[kind]["device_peak_bytes"] for kind in ("measured", "predicted"))
    assert measured == pytest.approx(planned, rel=0.05, abs=32 * 2**20)
    assert arm == "device" or report["traffic"] == report["predicted"]["traffic"]


@pytest.mark.slow
def test_the_peak_of_a_streamed_model_does_not_grow_with_its_depth(tmp_path: Path) -> None:
    peaks = {}
    for num_layers in (4, 64):
        size = [
            f"model.num_layers={num_layers}",
            f"blocks.num_blocks={num_layers}",
            "train.micro_batch_size=16",
        ]
        report = report_of(
            tmp_path / str(num_layers),
            "digits-vit-end-to-end",
            *size,
            "offload.tier=disk",
            "offload.borders=disk",
            "offload.resident_layers=0",
        )
        peaks[num_layers] = report["measured"]["device_peak_bytes"]
        assert report["settings"]["tier"] == "disk" and report["predicted"]["by_category"]["borders"] > 0
    assert peaks[64] == pytest.approx(peaks[4], rel=0.02)


@pytest.mark.slow
def test_the_peak_of_a_streamed_model_does_not_depend_on_how_its_layers_are_cut_into_blocks(
    tmp_path: Path,
) -> None:
    """Without a norm of a block's own to clip by: that needs all gradients of a block together."""
    wide = ["model.dim=512", "model.num_layers=16", "train.batch_size=8", "train.micro_batch_size=8"]
    streams = ["offload.tier=disk", "offload.resident_layers=0", "optimizer.grad_clip=null"]
    peaks = {}
    for num_blocks in (2, 4, 8, 16):
        cut = f"blocks.num_blocks={num_blocks}"
        report = report_of(tmp_path / cut, "digits-vit-end-to-end", *wide, *streams, cut)
        peaks[num_blocks] = report["measured"]["device_peak_bytes"]
        assert peaks[num_blocks] == pytest.approx(report["predicted"]["device_peak_bytes"], rel=0.05)
    assert max(peaks.values()) < 1.02 * min(peaks.values()), peaks
