"""The commit point, the lock and the refusals of a run folder."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowmem.blocks.run_dir import BlockRecord, FileRecord, RunDir, RunState
from lowmem.errors import ResumeError, StoreError
from lowmem.planning.plan import first_difference

HOLDER = """
import sys, time
from lowmem.blocks.run_dir import RunDir
run = RunDir(sys.argv[1])
run.acquire()
print("held", flush=True)
time.sleep(120)
"""


def add_file(run: RunDir, name: str, num_bytes: int = 8) -> FileRecord:
    (run.path / name).write_bytes(bytes(num_bytes))
    return FileRecord(name=name, num_bytes=num_bytes, digest="0" * 64)


def state_with(*records: FileRecord, visits_done: int = 0) -> RunState:
    return RunState(
        visits_done=visits_done,
        files={f"block-{i}": record for i, record in enumerate(records)},
        blocks=[BlockRecord(block=0, loss=0.5)],
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `run`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_committed_state_is_read_back_equal(run: RunDir) -> None:
    state = state_with(add_file(run, "block-0000.000001.safetensors"), visits_done=1)
    assert run.read_state() is None
    run.commit(state)
    assert run.read_state() == state


def test_a_commit_cut_off_before_the_move_leaves_the_old_state_and_its_files(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = state_with(add_file(run, "block-0000.000001.safetensors"), visits_done=1)
    run.commit(old)
    new = state_with(add_file(run, "block-0000.000002.safetensors"), visits_done=2)

    def cut_off(*_: object) -> None:
        raise OSError(errno.EIO, "power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut_off)
        with pytest.raises(StoreError, match="power cut"):
            run.commit(new)
    assert run.read_state() == old
    run.check_files(old)
    run.commit(new)
    assert run.read_state() == new


def test_a_commit_removes_files_that_it_does_not_name_and_no_others(run: RunDir) -> None:
    kept = add_file(run, "block-0000.000002.safetensors")
    for name in ("block-0000.000001.safetensors", "shared.000009.safetensors"):
        add_file(run, name)
    run.telemetry_path.write_text("{}\n")
    run.write_plan({"schema": 1})
    run.commit(state_with(kept))
    assert sorted(p.name for p in run.path.iterdir()) == [
        kept.name,
        "plan.json",
        "state.json",
        "telemetry.jsonl",
    ]


def test_leftovers_of_a_run_without_a_commit_are_removed(run: RunDir) -> None:
    add_file(run, "shared.000000.safetensors")
    run.remove_leftovers(None)
    assert not list(run.path.glob("*.safetensors"))


def test_the_lock_refuses_a_second_process(run: RunDir, holder: subprocess.Popen[str]) -> None:
    assert run.is_locked()
    with pytest.raises(ResumeError, match="another process is training"):
        run.acquire()


def test_the_lock_is_free_after_its_process_is_killed(run: RunDir, holder: subprocess.Popen[str]) -> None:
    holder.kill()  # SIGKILL: it cannot clean up
    holder.wait()
    assert (run.path / "lock").exists()
    assert not run.is_locked()
    run.acquire()
    assert run.is_locked()
    run.release()
    assert not run.is_locked()


@pytest.mark.parametrize(
    ("damage", "found"),
    [("truncate", "found 5 bytes"), ("grow", "found 9 bytes"), ("remove", "found no file")],
)
def test_a_damaged_file_is_named_with_expected_and_found_sizes(run: RunDir, damage: str, found: str) -> None:
    good, bad = add_file(run, "block-0000.000001.safetensors"), add_file(run, "block-0001.000002.safetensors")
    state, path = state_with(good, bad), run.path / bad.name
    run.check_files(state)
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(bytes(5 if damage == "truncate" else 9))
    with pytest.raises(StoreError, match=found) as caught:
        run.check_files(state)
    assert bad.name in str(caught.value) and "expected 8 bytes" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "state.json", "x.safetensors\n"]
)
def test_a_state_that_names_a_file_outside_the_folder_is_refused(run: RunDir, name: str) -> None:
    run.commit(state_with(add_file(run, "block-0000.000001.safetensors")))
    content = json.loads(run.state_path.read_text())
    content["files"]["block-0"]["name"] = name
    run.state_path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match="files.block-0.name"):
        run.read_state()


@pytest.mark.parametrize(
    "text", ["", '{"schema": 1, "visits_do', "[]", '{"schema": 1, "surprise": 2}', '{"schema": 2}']
)
def test_a_state_that_is_not_what_lowmem_writes_is_refused_in_one_line(run: RunDir, text: str) -> None:
    run.state_path.write_text(text)
    with pytest.raises(StoreError, match="state.json") as caught:
        run.read_state()
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_plan_is_not_a_run(run: RunDir) -> None:
    with pytest.raises(ResumeError, match="no plan.json"):
        run.read_plan()
    run.write_plan({"schema": 1, "recipe": {"method": "end_to_end"}})
    assert run.read_plan() == {"schema": 1, "recipe": {"method": "end_to_end"}}


def test_file_names_sort_by_block_and_visit_and_are_accepted_in_a_state(run: RunDir) -> None:
    names = [run.file_name("block-3", 12), run.file_name("shared", 0)]
    assert names == ["block-0003.000012.safetensors", "shared.000000.safetensors"]
    assert [FileRecord(name=name, num_bytes=0, digest="0" * 64).name for name in names] == names


def test_first_difference_names_the_first_dotted_key_with_both_values() -> None:
    frozen = {
        "recipe": {"train": {"lr": 0.1, "seed": 0}, "blocks": {"num_blocks": 3}},
        "profile": {"name": "a"},
    }
    given = {
        "profile": {"name": "b"},
        "recipe": {"blocks": {"num_blocks": 4}, "train": {"lr": 0.1, "seed": 1}},
    }
    assert first_difference(frozen, given) == ("recipe.train.seed", 0, 1)
    assert first_difference(frozen, frozen) is None
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == ("a.c", None, 2)
    assert first_difference({"a": {"b": 1}}, {"a": 7}) == ("a", {"b": 1}, 7)
    assert first_difference({"betas": [0.9, 0.95]}, {"betas": [0.9, 0.99]}) == (
        "betas",
        [0.9, 0.95],
        [0.9, 0.99],
    )
