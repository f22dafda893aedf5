"""A run's folder is looked at before training, by `verify`, and mended by `recover`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import run_short

from lowmem.blocks.run_dir import RunDir, RunState
from lowmem.blocks.verify import check_contents, recover_run, verify_run
from lowmem.errors import ResumeError, StoreError
from lowmem.reporting.report import digest

TIER: dict[str, Any] = {"offload__tier": "disk"}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> RunState:
    return run_short(tmp_path_factory.mktemp("unbroken"), **TIER)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after five commits of nine."""
    folder = tmp_path_factory.mktemp("half") / "run"

    def stop(record: dict[str, Any]) -> None:
        if record["event"] == "visit" and record["visit"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_short(folder, [stop], **TIER, offload__write_back="wait")
    return folder


@pytest.fixture
def stopped(half: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def newest_block(folder: Path) -> Path:
    """The file that the last visit wrote, of a block: the commit before has another one."""
    return max(folder.glob("block-*.safetensors"), key=lambda path: path.name.split(".")[1])


def go_on(folder: Path) -> RunState:
    return run_short(folder, **TIER, offload__write_back="wait")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_whole_run_is_said_to_be_whole_and_nothing_is_changed(stopped: Path) -> None:
    (stopped / "best.safetensors").write_bytes(b"theirs")
    before = contents(stopped)
    found = verify_run(stopped)
    assert found["whole"] and (found["visits_done"], found["previous_visits_done"]) == (5, 4)
    assert {row["file"] for row in found["files"]} == set(before) - {"lock"}
    assert [row["file"] for row in found["files"] if row["state"] == "other"] == ["best.safetensors"]
    assert contents(stopped) == before


@pytest.mark.parametrize("position", [0, 4096, 20_000, -1])
def test_a_changed_byte_of_any_block_file_is_found_by_verify(stopped: Path, position: int) -> None:
    state = RunDir(stopped).read_state()
    assert state is not None
    for record in state.files.values():
        flip(stopped / record.name, min(position, record.num_bytes - 1))
        [bad] = [row for row in verify_run(stopped)["files"] if row["state"] == "damaged"]
        assert bad["file"] == record.name
        with pytest.raises(StoreError, match=f"{record.name}: its (header is damaged|data differ)"):
            check_contents(RunDir(stopped), state)
        flip(stopped / record.name, min(position, record.num_bytes - 1))
    assert verify_run(stopped)["whole"]


def test_damage_to_a_block_of_a_later_visit_is_found_before_the_first_one(stopped: Path) -> None:
    state = RunDir(stopped).read_state()
    assert state is not None
    records = [record for key, record in state.files.items() if key != "shared"]
    block = stopped / min(records, key=lambda record: record.name.split(".")[1]).name
    flip(block, 20_000)
    before = contents(stopped)
    with pytest.raises(StoreError, match=f"{block.name}: its data differ"):
        go_on(stopped)
    assert contents(stopped) == before, "nothing is written"


@pytest.mark.parametrize("name", ["plan.json", "state.json", "state.previous.json"])
@pytest.mark.parametrize("damage", ["emptied", "changed", "pipe", "link"])
def test_damage_to_the_plan_or_a_state_is_found_by_verify(stopped: Path, name: str, damage: str) -> None:
    path = stopped / name
    if damage == "changed":
        path.write_text(path.read_text().replace("1", "2"))
    elif damage == "emptied":
        path.write_bytes(b"")
    else:
        path.rename(stopped / "elsewhere")
        os.mkfifo(path) if damage == "pipe" else path.symlink_to("elsewhere")
    try:
        found = verify_run(stopped)
        assert not found["whole"]
    except ResumeError as problem:  # its schema is what was changed
        assert "schema" in str(problem)


def test_a_run_without_its_state_is_refused_and_all_of_its_files_stay(stopped: Path) -> None:
    (stopped / "state.json").unlink()
    before = contents(stopped)
    with pytest.raises(StoreError, match="state.json: missing"):
        go_on(stopped)
    assert contents(stopped) == before


@pytest.mark.parametrize("damage", ["none", "block", "block gone", "shared", "state", "state gone"])
def test_recover_goes_back_one_commit_and_the_run_then_ends_with_the_unbroken_digest(
    stopped: Path, damage: str, unbroken: RunState
) -> None:
    if damage.startswith("state"):
        (stopped / "state.json").write_bytes(b"{")
    elif damage != "none":
        pattern = "shared.000005*" if damage == "shared" else newest_block(stopped).name
        flip(next(stopped.glob(pattern)), 20_000 if damage == "block" else 4096)
    if damage.endswith("gone"):
        (newest_block(stopped) if damage.startswith("block") else stopped / "state.json").unlink()
    if damage != "none":
        with pytest.raises(StoreError, match="lowmem recover"):
            go_on(stopped)
    found = recover_run(stopped)
    assert found["visits_done"] == 4
    assert found["visits_lost"] == (None if damage.startswith("state") else 1)
    assert "2 steps of block" in found["lost"] or "could not be read" in found["lost"]
    assert verify_run(stopped)["whole"]
    assert digest(go_on(stopped)) == digest(unbroken)


def test_recover_changes_nothing_where_the_commit_before_is_damaged_or_there_is_none(stopped: Path) -> None:
    old = min(stopped.glob("block-*.safetensors"), key=lambda path: path.name.split(".")[1])
    flip(old, 20_000)
    before = contents(stopped)
    with pytest.raises(StoreError, match="its data differ"):
        recover_run(stopped)
    assert contents(stopped) == before
    flip(old, 20_000)
    recover_run(stopped)
    with pytest.raises(StoreError, match="no commit is kept before the last one"):
        recover_run(stopped)


def test_recover_waits_for_no_process_that_trains(stopped: Path) -> None:
    run = RunDir(stopped)
    run.acquire()
    try:
        with pytest.raises(ResumeError, match="another process is training"):
            recover_run(stopped)
    finally:
        run.release()


def test_train_on_a_finished_run_leaves_foreign_files(tmp_path: Path, unbroken: RunState) -> None:
    assert digest(go_on(tmp_path / "run")) == digest(unbroken)
    (tmp_path / "run" / "best.safetensors").write_bytes(b"theirs")
    before = contents(tmp_path / "run")
    go_on(tmp_path / "run")
    after = contents(tmp_path / "run")
    assert {name: after[name] for name in before if name != "telemetry.jsonl"} == {
        name: content for name, content in before.items() if name != "telemetry.jsonl"
    }
