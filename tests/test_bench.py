"""The measuring scripts: they run, and what they print adds up. They measure nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_the_quick_bench_writes_every_figure_and_says_which_formula_it_is_held_against(
    tmp_path: Path,
) -> None:
    out, scratch = tmp_path / "bench.json", tmp_path / "runs"
    command = [
        sys.executable,
        str(SCRIPTS / "bench"),
        "--quick",
        "--profile",
        "cpu-16gib",
        "--run-dir",
        str(scratch),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    [row] = found["steps"]
    run, traffic = row["runs"][0], row["traffic"]
    assert (row["arm"], row["steps_per_visit"]) == ("disk", 2)
    assert row["step_ratio"] == pytest.approx(run["step_s"] / row["resident_runs"][0]["step_s"])
    moved = run["traffic"]["disk_read_bytes"] + run["traffic"]["disk_written_bytes"]
    assert traffic["ours_disk_bytes_per_step"] == pytest.approx(moved / 8)  # 2 blocks, 2 visits of 2 steps
    assert run["traffic"]["disk_read_bytes"] >= 4 * run["block_bytes"]
    assert traffic["zero3"]["disk_bytes"] == (12 + 2 * 4 + 12) * run["num_parameters"]  # in fp32
    assert traffic["disk_ratio"] == pytest.approx(
        traffic["zero3"]["disk_bytes"] / traffic["ours_disk_bytes_per_step"]
    )
    assert [depth["num_blocks"] for depth in found["depths"]] == [2, 4]
    assert found["depths"][1]["num_parameters"] > 1.7 * found["depths"][0]["num_parameters"]
    assert found["depth_spread"] == pytest.approx(
        abs(found["depths"][0]["device_peak_bytes"] / found["depths"][1]["device_peak_bytes"] - 1), rel=0.1
    )
    assert set(found["disk_ratio"]) == {"write", "first_read", "read"}
    assert traffic["zero3"]["formula"] in done.stdout and "| disk | 2 |" in done.stdout
    assert not scratch.exists(), "no scratch is left"
