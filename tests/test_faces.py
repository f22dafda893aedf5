"""What a person or a program meets at the border: terminals, pipes, odd names, odd files, odd numbers."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowmem import cli
from lowmem.blocks.run_dir import RunDir
from lowmem.errors import ConfigError, LowmemError, StoreError
from lowmem.recipe import load_recipe
from lowmem.reporting.dashboard import status_lines
from lowmem.reporting.output import check_output, write_output
from lowmem.reporting.report import read_report, read_status
from lowmem.schema import yaml_value
from lowmem.units import counted, finite, shown

ROOT = Path(__file__).parents[1]


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    words = [sys.executable, "-m", "lowmem", *arguments]
    return subprocess.run(words, env=environment, stdout=subprocess.PIPE, **options)


# ------------------------------------------------------------------------------------------------------------
# Texts


@pytest.mark.parametrize("odd", ["\x1b[2J", "\n", "\x07", "\x9b31m", "\u202e", "\u2028", "\udcff", "\x7f"])
def test_a_text_of_a_file_is_one_printable_line_in_every_message(odd: str) -> None:
    for text in (shown(f"a{odd}b"), str(LowmemError(f"a{odd}b"))):
        assert text.isprintable() and text.startswith("a") and text.endswith("b")


def test_a_long_message_keeps_its_beginning_and_its_cure() -> None:
    message = str(ConfigError(f"where: found {'x' * 5_000_000}; do this"))
    assert len(message) <= 600 and message.startswith("where: ") and message.endswith("; do this")
    assert len(shown("\x1b" * 1000, 100)) <= 100


def test_numbers_that_json_cannot_write_become_null() -> None:
    given = {"a": float("nan"), "b": [1.0, float("inf")], "c": "nan"}
    assert json.loads(json.dumps(finite(given), allow_nan=False)) == {"a": None, "b": [1.0, None], "c": "nan"}


# ------------------------------------------------------------------------------------------------------------
# YAML


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: {<<: {b: 1}}", "merge key"),
        ("a: &x [1]\nb: *x", "alias"),
        ("a: 1:30", "90"),
        ("a: 1:30.5", "base 60"),
        ("a: 010", "octal"),
        ("a: " + "9" * 5000, "too many digits"),
        ("schema: " + "[" * 3000, "levels"),
        ("a: 1\na: 2", "stands twice"),
        ("? [a]\n: 1", "plain word"),
        ("\n".join(f"k{i}: 1" for i in range(20_000)), "characters"),
    ],
)
def test_yaml_that_says_something_else_than_it_seems_or_grows_is_refused(text: str, words: str) -> None:
    with pytest.raises(Exception, match=words):
        yaml_value(text)


def test_plain_numbers_are_read_as_meant() -> None:
    text = "{a: 0, b: 1_000, c: 0x10, d: -5, e: 1.5, f: 1.0e-3, g: '010', h: '1:30'}"
    assert list(yaml_value(text).values()) == [0, 1000, 16, -5, 1.5, 1e-3, "010", "1:30"]


# ------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(
    "override",
    [
        "train.lr=1.0e+300",
        "train.num_steps=1000000000000000000000000",
        "optimizer.eps=1.0e+300",
        "optimizer.eps=1.0e-300",
        "optimizer.weight_decay=1.0e+8",
        "optimizer.weight_decay=1.0e+5",  # times the learning rate: more than the whole weight
        "optimizer.betas=[0.9, 0.9999999999]",
        "model.dim=1000000000000000000000",
        "model.num_layers=100000",
        "train.batch_size=1000003",
        "train.batch_size=1000000000000000",
        "train.seed=100000000000000000000",
        "noise.sigma_max=1.0e+300",
        "noise.p_mean=1.0e+300",
        "eval.batch_size=1000000000000",
    ],
)
def test_a_number_beyond_what_trains_is_refused_before_a_model_is_built(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("digits-vit", [override])
    assert override.split("=")[0] in str(caught.value) and "allowed" in str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# Terminals, pipes, closed streams


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_what_a_terminal_cannot_encode_is_replaced(encoding: str) -> None:
    done = command("profiles", env={"PYTHONIOENCODING": encoding}, stderr=subprocess.PIPE)
    assert done.returncode == 0 and b"cpu-4gib" in done.stdout and done.stderr == b""


@pytest.mark.skipif(os.name == "nt", reason="closes a stream by its number")
def test_json_on_stdout_is_one_object_when_stderr_is_closed(trained: Path) -> None:
    def close() -> None:
        os.close(2)

    done = command("report", str(trained), "--json", preexec_fn=close)
    assert done.returncode == 0 and json.loads(done.stdout)["method"] == "diffusion_blocks"
    assert command("report", "no-such-run", "--json", preexec_fn=close).stdout == b""


def test_an_unforeseen_fault_is_one_line_and_its_traceback_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(**_: object) -> None:
        raise KeyError("un\x1bforeseen")

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli._outcome() == 1
    line = capsys.readouterr().err
    (kept,) = tmp_path.iterdir()
    assert len(line.splitlines()) == 1 and "KeyError" in line and str(kept) in line and "\x1b" not in line
    assert "Traceback" in kept.read_text()


# ------------------------------------------------------------------------------------------------------------
# What is written by name


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_no_file_of_a_run_is_written_over(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(copy / "state.json")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    for name in (copy / "state.json", tmp_path / "link.txt", copy / "new.json", copy, tmp_path / "no" / "x"):
        with pytest.raises(ConfigError, match="^--out") as caught:
            write_output(name, b"x", "--out")
        assert str(caught.value).count("--out") == 1
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert check_output(copy / "samples.txt", "--out")


def test_a_file_is_written_whole_beside_its_hard_links(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    os.link(tmp_path / "old", tmp_path / "out.txt")
    write_output(tmp_path / "out.txt", b"new", "--out")
    assert (tmp_path / "old").read_bytes() == b"old" and (tmp_path / "out.txt").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_cannot_be_written_is_one_line_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "out.txt").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        ConfigError, match="out.txt: No space left on device; give a file in a folder"
    ) as caught:
        write_output(tmp_path / "out.txt", b"new", "--out")
    assert "commit" not in str(caught.value)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


# ------------------------------------------------------------------------------------------------------------
# Run folders of other versions, and from elsewhere


def _edit(path: Path, change: Any) -> None:
    """Changes a plan as one may who knows how it is sealed, or whose version seals in the same way."""
    run = RunDir(path.parent)
    content = run.read_plan()
    change(content)
    run.replace_plan(content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan.clear(), "found schema None; this lowmem reads schema 1"),
        (lambda plan: plan.update(schema=2), "found schema 2; this lowmem reads schema 1"),
        (lambda plan: plan["predicted"].pop("host_by_category"), "'predicted.host_by_category' is missing"),
        (lambda plan: plan["predicted"].update(device_peak_bytes=0), "predicted.device_peak_bytes"),
        (lambda plan: plan["predicted"]["block_peak_bytes"].pop(), "block_peak_bytes"),
        (lambda plan: plan["settings"].update(num_blocks=10**9), "settings.num_blocks"),
        (lambda plan: plan["recipe"].update(train=[]), "recipe.train"),
        (lambda plan: plan.update(num_parameters="many"), "num_parameters"),
    ],
)
def test_a_plan_of_another_version_is_refused_in_one_line(copy: Path, change: Any, words: str) -> None:
    _edit(copy / "plan.json", change)
    for read in (read_report, read_status):
        with pytest.raises(LowmemError) as caught:
            read(copy)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        '{"event":"step"}',
        '{"event":"step","time":1.0,"step":3,"host_bytes":"many"}',
        '{"event":"visited","time":1.0}',
        '{"event":"visit","time":1.0,"visit":0,"blocks":[7],"first_step":0,"num_steps":1}',
        '{"event":"commit","time":"now","visits_done":1}',
        '{"event":["step"],"time":1.0}',
        '{"event":"step","time":1.0,"st',
        "[" * 100_000,
        '{"event":"step","time":1.0,"step":' + "9" * 5000 + "}",
        "\x00\x00",
    ],
)
def test_a_foreign_line_of_the_telemetry_is_left_out_and_counted(copy: Path, line: str) -> None:
    # So wide that the first line holds all that depends on the clock.
    before = status_lines(copy, 200)[1]
    with open(copy / "telemetry.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    lines = status_lines(copy, 200)[1]
    assert "left out 1 line of telemetry.jsonl" in lines[-1] and lines[1:-1] == before[1:]
    assert read_status(copy)["skipped_records"] == 1


def test_a_warning_of_a_foreign_folder_does_not_reach_the_terminal_as_a_command(copy: Path) -> None:
    record = {"event": "warning", "time": 1.0, "message": "\x1b[2J\x1b]0;x\x07"}
    with open(copy / "telemetry.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    assert all(line.isprintable() for line in status_lines(copy, 100)[1])


def test_a_run_that_failed_is_not_advised_to_run_the_same_command_again(copy: Path) -> None:
    state = RunDir(copy).read_state()
    assert state is not None
    RunDir(copy).commit(state.model_copy(update={"visits_done": state.visits_done - 1}))
    assert "run the same train command again" in status_lines(copy, 200)[1][0]
    with open(copy / "telemetry.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "failed", "time": 1.0, "message": "optimizer.eps 1e-30"}) + "\n")
    lines = status_lines(copy, 200)[1]
    assert "same command would meet again" in lines[0] and lines[1] == "optimizer.eps 1e-30"


def test_metrics_and_blocks_that_no_report_can_show_are_refused(copy: Path) -> None:
    run = RunDir(copy)
    state = run.read_state()
    assert state is not None
    for update in ({"metrics": {"metric": "accuracy"}}, {"blocks": state.blocks[:1]}):
        run.commit(state.model_copy(update=update))
        with pytest.raises(StoreError, match=r"state\.json"):
            read_report(copy)


def test_one_of_a_thing_is_said_in_the_singular() -> None:
    assert [counted(number, "step") for number in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
    assert [counted(number, "class", "classes") for number in (1, 2)] == ["1 class", "2 classes"]
