"""A short form of `scripts/torture` from a fixed seed: damage, kills, disk faults, power loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="it forks, and looks into /proc")
@pytest.mark.slow
def test_a_tortured_run_loses_nothing_and_touches_nothing_foreign(tmp_path: Path) -> None:
    out = tmp_path / "torture.json"
    command = [sys.executable, str(ROOT / "scripts" / "torture"), "--cases", "3", "--out", str(out)]
    command += ["--bench", "diffusion_blocks-disk"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    parts = {part["part"].partition(",")[0]: part for part in json.loads(out.read_text())["parts"]}
    assert done.returncode == 0, [part["found"] for part in parts.values()]
    assert set(parts) >= {"damage", "kill -9", "disk faults", "power loss", "two processes"}
    assert all(part["cases"] >= 2 for part in parts.values())
