"""The data of a run are part of its identity: a run goes on, and is evaluated, with the same data only.

A finished run is read without its data.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import as_overrides

from lowmem import cli
from lowmem.blocks.run_dir import RunDir
from lowmem.data.config import HuggingfaceText
from lowmem.errors import ConfigError, DataError, LowmemError, ResumeError
from lowmem.inference.evaluate import evaluate_run
from lowmem.inference.export import export_run
from lowmem.inference.generate import sample_run
from lowmem.job import train
from lowmem.reporting.telemetry import read_records

TEXT = "abcde" * 200
QUICK = {
    "train__num_steps": 4,
    "train__batch_size": 8,
    "train__seq_len": 16,
    "train__warmup_steps": 0,
    "blocks__num_blocks": 2,
    "blocks__visit_steps": 2,
    "model__num_layers": 2,
    "model__dim": 16,
    "model__num_heads": 2,
}
DATA = {"name": "text", "path": "own.txt", "tokenizer": "characters"}
OVERRIDES = [*as_overrides(**QUICK), f"data={json.dumps(DATA)}"]


class Stop(Exception):
    """What a test stops a run with."""


def go_on(run: Path, *listeners: Any, accept_data: bool = False) -> Path:
    return train("stdlib-causal", "cpu-4gib", run, OVERRIDES, listeners, accept_data)


def stop_at_second_visit(record: dict[str, Any]) -> None:
    if record["event"] == "visit" and record["visit"] == 1:
        raise Stop


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on own.txt, one that stopped after its first visit and one that is finished."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        Path("own.txt").write_text(TEXT)
        with pytest.raises(Stop):
            go_on(Path("stopped"), stop_at_second_visit)
        shutil.copytree("stopped", "finished")
        go_on(Path("finished"))
    return folder


@pytest.fixture
def here(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another folder, with copies of the runs and of the text, and an empty cache."""
    for name in ("stopped", "finished"):
        shutil.copytree(runs / name, tmp_path / name)
    shutil.copy(runs / "own.txt", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digests(run: Path) -> list[str]:
    state = RunDir(run).read_state()
    assert state is not None
    return [record.digest for record in state.files.values()]


def test_a_run_goes_on_with_the_same_text_wherever_it_lies(runs: Path, here: Path) -> None:
    assert digests(go_on(here / "stopped")) == digests(runs / "finished")


@pytest.mark.parametrize(
    "changed", [TEXT.replace("a", "b", 1), TEXT + "a", "x" * len(TEXT)], ids=["edited", "appended", "another"]
)
def test_a_run_does_not_go_on_with_another_text(here: Path, changed: str) -> None:
    before = {path: path.read_bytes() for path in (here / "stopped").iterdir()}
    Path("own.txt").write_text(changed)
    with pytest.raises(ResumeError, match="data changed: found 1 item of .* or give --accept-data") as caught:
        go_on(here / "stopped")
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in (here / "stopped").iterdir()} == before


def test_an_accepted_change_is_recorded_and_read_with_the_runs_own_alphabet(here: Path) -> None:
    run = here / "stopped"
    before = json.loads((run / "plan.json").read_text())["data"]
    Path("own.txt").write_text("bcde" * 250)  # with an alphabet of its own all tokens would be shifted by one
    go_on(run, accept_data=True)
    after = json.loads((run / "plan.json").read_text())["data"]
    assert after["earlier"] == [before["fingerprint"]] and after["fingerprint"] != before["fingerprint"]
    assert after["alphabet"] == before["alphabet"] == list("abcde")
    (record,) = [
        found for found in read_records(run / "telemetry.jsonl") if found["event"] == "data_accepted"
    ]
    assert (record["before"], record["now"]) == (before["fingerprint"], after["fingerprint"])
    assert digests(go_on(run)) == digests(run), "what was accepted is the run's own from now on"


def test_letters_that_the_run_has_no_tokens_for_are_never_accepted(here: Path) -> None:
    plan = (here / "stopped" / "plan.json").read_bytes()
    Path("own.txt").write_text("abcdf" * 200)
    with pytest.raises(DataError, match="'f' is not among the 5 characters of the training text"):
        go_on(here / "stopped", accept_data=True)
    assert (here / "stopped" / "plan.json").read_bytes() == plan


def test_a_finished_run_is_sampled_and_exported_without_its_text(here: Path) -> None:
    Path("own.txt").unlink()
    text = sample_run(here / "finished", num=2).read_text()
    assert set(text.replace("--- sample 0, seed 0", "").replace("--- sample 1, seed 0", "")) <= {*"abcde\n"}
    assert export_run(here / "finished", here / "exported").is_dir()
    with pytest.raises(DataError, match="data.path: own.txt: No such file"):
        evaluate_run(here / "finished")
    Path("other.txt").write_text("edcba" * 100)
    assert evaluate_run(here / "finished", ["path=other.txt"])["value"] > 0


def test_a_finished_run_is_not_evaluated_on_a_changed_text_without_a_word(here: Path) -> None:
    Path("own.txt").write_text("z" + TEXT)
    with pytest.raises(DataError, match="found 1 item .* trained on 1 item .* --data path=FILE"):
        evaluate_run(here / "finished")


def foreign(run: Path, **data: Any) -> Path:
    """The run, with other data named in its plan, as a stranger may write them."""
    changed(
        run,
        lambda plan: plan["recipe"].update(data={"name": "huggingface", "dataset": "them/theirs", **data}),
    )
    return run


def changed(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the plan of a run as one may who knows how it is sealed."""
    folder = RunDir(run)
    plan = folder.read_plan()
    change(plan)
    folder.replace_plan(plan)


READS: list[Callable[[Path], object]] = [
    evaluate_run,
    lambda run: evaluate_run(run, ["test_split=all"]),
    sample_run,
    lambda run: export_run(run, run.parent / "out"),
]


@pytest.mark.parametrize("read", READS, ids=["eval", "eval_of_a_split", "sample", "export"])
@pytest.mark.parametrize("keeps_identity", [True, False])
def test_a_foreign_run_uses_no_network(
    here: Path, read: Callable[[Path], object], keeps_identity: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(HuggingfaceText, "open_split", lambda self, *_: asked.append(self.dataset))
    run = foreign(here / "finished", kind="text", tokenizer="characters")
    if not keeps_identity:
        changed(run, lambda plan: plan.update(data=None))
    try:
        read(run)
    except (DataError, ConfigError) as refused:
        assert "dataset=" in str(refused) and "\n" not in str(refused)
    else:
        assert read in READS[2:] and keeps_identity
    assert not asked


SECRET = "nobody is to see this " * 100
OUTPUTS = {"eval": evaluate_run, "sample": sample_run, "export": READS[3]}


def refusal_of(read: Callable[[Path], object], run: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(run)
    assert "\n" not in str(caught.value) and "nobody" not in str(caught.value)
    return str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_foreign_run_is_not_evaluated_on_a_file_of_this_machine_of_another_content(here: Path) -> None:
    (here / "secret").write_text(SECRET)
    run = here / "finished"
    changed(run, lambda plan: plan["recipe"]["data"].update(path=str(here / "secret")))
    assert "found 1 item of 2.1 KiB" in refusal_of(evaluate_run, run)
    (here / "secret").unlink()
    os.mkfifo(here / "secret")  # to open it would wait for ever
    assert "a pipe or a device" in refusal_of(evaluate_run, run)
    assert sample_run(run, num=1).is_file() and export_run(run, here / "out").is_dir(), "they do not open it"


@pytest.mark.parametrize("read", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("key", ["path", "tokenizer"])
def test_a_foreign_run_that_keeps_no_fingerprint_reads_no_file_of_this_machine(
    here: Path, read: Callable[[Path], object], key: str
) -> None:
    (here / "secret").write_text(SECRET)
    run, data = here / "finished", {"name": "text", "path": "own.txt", key: str(here / "secret")}

    def forge(plan: dict[str, Any]) -> None:
        plan["recipe"]["data"] = data
        plan["data"] = None

    changed(run, forge)
    assert "and no fingerprint of the data; allowed: both" in refusal_of(read, run)
    assert not (here / "out").exists() and not (run / "samples.txt").exists()


def test_the_command_line_passes_on_that_a_change_is_accepted(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    Path("own.txt").write_text(TEXT + "abc")
    command = ["lowmem", "train", "stdlib-causal", "--profile", "cpu-4gib", "--run-dir", "stopped", "--quiet"]
    command += [part for override in OVERRIDES for part in ("--set", override)]
    for more, code in ([], 2), (["--accept-data"], 0):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert (ended.value.code or 0) == code, capsys.readouterr().err


def test_the_refusals_of_data_are_the_users_to_mend() -> None:
    assert {DataError.exit_code, ResumeError.exit_code} == {2} and issubclass(DataError, LowmemError)
