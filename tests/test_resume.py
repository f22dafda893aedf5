"""`lowmem resume`: a run goes on from its folder alone, and further than first planned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lowmem import job
from lowmem.blocks.run_dir import RunDir
from lowmem.errors import DataError, ResumeError
from lowmem.planning.plan import read_plan
from lowmem.reporting.report import read_report

SHORT = [
    "blocks.visit_steps=2",
    "train.batch_size=8",
    "train.warmup_steps=2",
    "train.lr_schedule=constant",
    "eval.num_batches=1",
]


def trained_for(folder: Path, num_steps: int) -> Path:
    return job.train("digits-vit", "cpu-4gib", folder, [*SHORT, f"train.num_steps={num_steps}"])


def go_on(folder: Path, num_steps: int | None = None) -> str:
    plan = job.plan_resume(folder, num_steps)
    told = job.keep_length(plan, folder)
    job.train_plan(plan, folder)
    return told


def content(folder: Path) -> Any:
    return read_report(folder).content


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_for(tmp_path_factory.mktemp("resume") / "four", 4)


@pytest.fixture
def run(four_steps: Path, tmp_path: Path) -> Path:
    return shutil.copytree(four_steps, tmp_path / "run")


def test_a_finished_run_that_is_extended_ends_with_the_bits_of_one_that_was_never_stopped(
    run: Path, tmp_path: Path
) -> None:
    before = content(run)
    assert go_on(run, 6) == f"{run}: 6 steps in place of 4; the learning rate stays as it is"
    after, whole = content(run), content(trained_for(tmp_path / "whole", 6))
    assert after["digest"] == whole["digest"] != before["digest"]
    assert after["metrics"] == whole["metrics"] != before["metrics"]
    assert [block["steps"] for block in after["blocks"]] == [6, 6, 6]
    assert after["predicted"] == whole["predicted"]


def test_a_finished_run_that_is_resumed_stays_as_it_is(run: Path) -> None:
    before = content(run)
    assert go_on(run) == "" and go_on(run, 4) == ""
    assert content(run) == before


def test_a_kill_while_a_run_is_extended_leaves_a_whole_run(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunDir, "replace_plan", killed)
    with pytest.raises(KeyboardInterrupt):
        go_on(run, 6)
    monkeypatch.undo()
    assert content(run)["metrics"] is None
    go_on(run)
    assert content(run)["metrics"] is not None and read_plan(RunDir(run)).recipe.train.num_steps == 4


def test_visits_that_are_made_are_never_made_others(run: Path) -> None:
    with pytest.raises(ResumeError, match="found 2, and 4 steps are made; allowed: 4 or more"):
        job.plan_resume(run, 2)
    go_on(run, 5)
    with pytest.raises(ResumeError, match="allowed: 5, because its last visits were cut to 1 steps"):
        job.plan_resume(run, 8)


def test_the_cosine_is_said_to_jump(four_steps: Path, tmp_path: Path) -> None:
    run = shutil.copytree(four_steps, tmp_path / "cosine")
    plan = json.loads((run / "plan.json").read_text())
    plan["recipe"]["train"]["lr_schedule"] = "cosine"
    folder = RunDir(run)
    folder.identify()
    folder.replace_plan({key: value for key, value in plan.items() if key != "run"})
    assert "follows the cosine of 6 steps from here on" in job.keep_length(job.plan_resume(run, 6), run)


def test_a_folder_alone_opens_no_data_that_it_has_no_fingerprint_of(run: Path) -> None:
    folder = RunDir(run)
    raw = folder.read_plan()
    folder.replace_plan({**raw, "data": None})
    with pytest.raises(ResumeError, match="keeps no fingerprint of its data"):
        job.plan_resume(run)
    remote = {
        "name": "huggingface",
        "kind": "text",
        "dataset": "a/b",
        "tokenizer": "bytes",
        "text_column": "t",
    }
    folder.replace_plan({**raw, "recipe": {**raw["recipe"], "data": remote}})
    with pytest.raises((DataError, ResumeError), match="may use the network"):
        job.plan_resume(run)
