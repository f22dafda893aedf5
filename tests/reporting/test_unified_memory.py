"""Live view, status and page count the same bytes as the device's, whatever memory the machine has.

On a CUDA machine whose processor and card share one memory, the process's own memory is what counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowmem.blocks.run_dir import RunDir
from lowmem.machine.profile import load_profile
from lowmem.reporting import page
from lowmem.reporting.dashboard import RunView, status_lines
from lowmem.reporting.history import History
from lowmem.units import GIB, format_bytes

READING = {"host_bytes": 3 * GIB, "nvml_process_bytes": GIB, "device_reserved_bytes": 2 * GIB}
# machine -> (is its memory unified, bytes that count as the device's)
MACHINES = {
    "jetson-orin-nano-8gb": (True, 3 * GIB),
    "cpu-16gib": (True, 3 * GIB),
    "rtx-3060-12gb": (False, 2 * GIB),
}
machines = pytest.mark.parametrize("machine", MACHINES)


def run_on(machine: str, trained: Path, folder: Path) -> Path:
    """The trained run as if `machine` had made it, with READING in each step."""
    folder.mkdir()
    source, run, profile = RunDir(trained), RunDir(folder), load_profile(machine)
    plan = source.read_plan()
    plan["profile"] = profile.model_dump(mode="json", by_alias=True)
    plan["budget"] |= {
        "device_bytes": profile.device_budget_bytes,
        "host_bytes": profile.host_budget_bytes,
    }
    run.write_plan(plan)
    run.begin()
    state = source.read_state()
    assert state is not None
    run.commit(state.model_copy(update={"files": {}}))
    records: list[dict[str, Any]] = [
        {"event": "open", "visits_done": 0},
        {"event": "visit", "visit": 0, "blocks": [0], "first_step": 0, "num_steps": 2},
        {"event": "step", "step": 0, "loss": 1.0, **READING},
        {"event": "step", "step": 1, "loss": 0.5, **READING},
    ]
    lines = [json.dumps({**record, "time": float(moment)}) for moment, record in enumerate(records)]
    run.telemetry_path.write_text("\n".join(lines) + "\n")
    return folder


@machines
def test_the_live_view_shows_the_bytes_that_count_as_the_devices(
    machine: str, trained: Path, tmp_path: Path
) -> None:
    unified, counted = MACHINES[machine]
    _, lines = status_lines(run_on(machine, trained, tmp_path / "run"), 160)
    allowed = format_bytes(load_profile(machine).device_budget_bytes)
    shown = next(line for line in lines if line.startswith("  memory" if unified else "  device"))
    assert shown.endswith(f"{format_bytes(counted)} of {allowed}")
    hosts = [line for line in lines if line.startswith("  host")]
    assert [f"{format_bytes(READING['host_bytes'])} of" in line for line in hosts] == [True] * (not unified)


@machines
def test_the_summary_line_has_the_peak_of_those_bytes(machine: str, trained: Path, tmp_path: Path) -> None:
    run = RunDir(run_on(machine, trained, tmp_path / "run"))
    view = RunView(run.read_plan())
    view.feed({"event": "step", "time": 1.0, "step": 0, **READING})
    view.feed({"event": "step", "time": 2.0, "step": 1, **dict.fromkeys(READING, 1)})
    assert f"peak {format_bytes(MACHINES[machine][1])} of " in view.summary()


@machines
def test_the_page_draws_those_bytes_and_a_second_line_only_for_a_second_memory(
    machine: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[History] = []
    draw = page.memory_plot

    def noting(content: dict[str, Any], history: History, unified: bool) -> str:
        drawn.append(history)
        return draw(content, history, unified)

    monkeypatch.setattr(page, "memory_plot", noting)
    out = page.write_page([run_on(machine, trained, tmp_path / "run")], tmp_path / "page.html")
    unified, counted = MACHINES[machine]
    assert drawn[0].device_bytes == [counted] * 2
    assert drawn[0].host_bytes == [READING["host_bytes"]] * 2
    assert ("measured, host" in out.read_text(encoding="utf-8")) is not unified
