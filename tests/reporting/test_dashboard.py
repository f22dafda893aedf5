"""The live view of a real run, drawn at 80 and at 160 columns, from its files alone."""

from __future__ import annotations

import html
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lowmem.blocks.run_dir import RunDir
from lowmem.planning.plan import read_plan
from lowmem.reporting.dashboard import RunView, live_view, status_lines
from lowmem.reporting.report import read_report, read_status
from lowmem.reporting.telemetry import read_records


@pytest.mark.parametrize("width", [40, 80, 160])
def test_no_line_is_wider_than_the_terminal_and_every_block_and_pool_has_its_bar(
    trained: Path, width: int
) -> None:
    state, lines = status_lines(trained, width)
    assert state == "finished"
    assert all(len(line) <= width for line in lines), lines
    text = "\n".join(lines)
    for name in ("block 0", "block 1", "block 2", "memory", "waiting", "150/150"):
        assert name in text
    assert width == 40 or any(line.count("#") > (50 if width == 160 else 5) for line in lines)


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
    assert any(line.startswith("visit 3/18, step 25/150 of each of 3 blocks") for line in lines)
    assert sum("]     25/150" in line for line in lines) == 3


def records_of(run: Path, *records: dict[str, Any]) -> None:
    with open(run / "telemetry.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps({"time": 1.0, **record}) + "\n" for record in records)


def test_a_run_that_is_evaluated_says_so_with_how_far_it_is_and_is_stopped_where_that_died(
    trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    folder = RunDir(run)
    state = folder.read_state()
    assert state is not None
    folder.commit(state.model_copy(update={"metrics": None}))
    records_of(run, {"event": "evaluating", "message": "evaluation: 40%, about 9.00 s left", "share": 0.4})
    folder.acquire()
    try:
        assert read_status(run)["state"] == "evaluating"
        state_now, lines = status_lines(run, 80)
        assert state_now == "evaluating" and "evaluation: 40%, about 9.00 s left" in lines
        assert any(line.startswith("  evaluates [####") and line.endswith("40%") for line in lines)
        records_of(run, {"event": "open", "visits_done": 18})
        assert status_lines(run, 80)[0] == "running"
    finally:
        folder.release()
    records_of(run, {"event": "evaluating", "message": "evaluation: begins", "share": 0.0})
    state_then, lines = status_lines(run, 80)
    assert state_then == "stopped" and "18/18" in " ".join(lines)
    assert not any(line.startswith(("evaluation", "  evaluates")) for line in lines)


def test_the_telemetry_of_a_run_has_its_evaluation_from_beginning_to_end(trained: Path) -> None:
    events = [record["event"] for record in read_records(trained / "telemetry.jsonl")]
    after = events[events.index("trained") + 1 :]
    assert after[0] == "evaluating" and after[-1] == "evaluated" and len(after) >= 3


def test_notes_end_between_words_and_lose_none(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    words = " ".join(f"word{number}" for number in range(40))
    records_of(run, {"event": "warning", "message": words})
    for width in (30, 80):
        lines = status_lines(run, width)[1]
        assert all(len(line) <= width for line in lines)
        assert f"warning: {words}" in " ".join(line.strip() for line in lines)


def test_time_left_counts_the_steps_of_each_block_and_names_the_evaluation(trained: Path) -> None:
    view = RunView({**RunDir(trained).read_plan()})
    view.evaluation_s = 90.0
    view.feed({"event": "visit", "blocks": [0]})
    for step in range(3):
        view.feed({"event": "step", "time": 10.0 + step, "step": step, "loss": 1.0})
    assert view.headline().startswith(
        "visit 0/18, step 1/150 of each of 3 blocks, 0.3 steps/s, 7 min 27 s left"
    )
    assert view.headline().endswith(", then 1 min 30 s of evaluation")


def test_a_notebook_draws_the_run_under_its_cell(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, what: Any) -> None:
            shown.append(what._repr_html_())

    shell = ModuleType("IPython")
    shell.get_ipython = lambda: SimpleNamespace(kernel=True)  # type: ignore[attr-defined]
    display = ModuleType("IPython.display")
    display.display = lambda what, display_id: Handle()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    with live_view(trained) as view:
        view({"event": "warning", "time": 0.0, "message": "a <b> & c"})
    assert len(shown) == 1 and shown[0].startswith("<pre>visit ") and "a &lt;b&gt; &amp; c" in shown[0]
    assert capsys.readouterr().err == ""


def test_a_plan_and_a_report_show_their_tables_in_a_notebook(trained: Path) -> None:
    plan, report = read_plan(RunDir(trained)), read_report(trained)
    for each in (plan, report):
        assert each._repr_html_() == f"<pre>{html.escape(each.table())}</pre>"
