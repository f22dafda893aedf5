"""The live view of a real run, drawn at 80 and at 160 columns, from its files alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lowmem.blocks.run_dir import RunDir
from lowmem.reporting.dashboard import status_lines


@pytest.mark.parametrize("width", [40, 80, 160])
def test_no_line_is_wider_than_the_terminal_and_every_block_and_pool_has_its_bar(
    trained: Path, width: int
) -> None:
    state, lines = status_lines(trained, width)
    assert state == "finished"
    assert all(len(line) <= width for line in lines), lines
    text = "\n".join(lines)
    for name in ("block 0", "block 1", "block 2", "memory", "waiting"):
        assert name in text
    assert "advice: " in text
    assert any(line.count("#") > (50 if width == 160 else 5) for line in lines)


def test_a_run_that_died_is_shown_as_stopped_with_what_it_had_committed(
    trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "died"
    shutil.copytree(trained, run)
    died = RunDir(run).read_state()
    assert died is not None
    blocks = [block.model_copy(update={"steps": 25, "visits": 1}) for block in died.blocks]
    RunDir(run).commit(died.model_copy(update={"visits_done": 3, "blocks": blocks, "metrics": None}))
    state, lines = status_lines(run, 80)
    assert state == "stopped"
    assert "visit 3/18" in lines[1] and "25/150" in lines[2]
