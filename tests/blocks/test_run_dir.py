"""The commit point, the identity, the lock and the refusals of a run folder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowmem.blocks.run_dir import BASE_KEY, SHARED_KEY, BlockRecord, FileRecord, RunDir, RunState
from lowmem.errors import LowmemError, ResumeError, StoreError
from lowmem.planning.plan import first_difference

HOLDER = """
import sys, time
from lowmem.blocks.run_dir import RunDir
run = RunDir(sys.argv[1])
run.acquire()
print("held", flush=True)
time.sleep(120)
"""
ZEROS = "0" * 64


def add_file(run: RunDir, key: str, visits: int, num_bytes: int = 8) -> FileRecord:
    name = run.file_name(key, visits)
    (run.path / name).write_bytes(bytes(num_bytes))
    return FileRecord(name=name, num_bytes=num_bytes, header=ZEROS, digest=ZEROS)


def state_with(*records: FileRecord, visits_done: int = 0) -> RunState:
    return RunState(
        visits_done=visits_done,
        files={f"block-{i}": record for i, record in enumerate(records)},
        blocks=[BlockRecord(block=0, loss=0.5)],
    )


def commit_visit(run: RunDir, visit: int) -> RunState:
    state = state_with(add_file(run, "block-0", visit), visits_done=visit)
    run.commit(state)
    return state


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that has begun: nothing but its plan and an empty state are written."""
    begun = RunDir(tmp_path)
    begun.write_plan({"schema": 1, "recipe": {"method": "end_to_end"}})
    begun.begin()
    return begun


@pytest.fixture
def holder(run: RunDir) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `run`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


# ------------------------------------------------------------------------------------------------------------
# Commits


def test_a_committed_state_is_read_back_equal(run: RunDir) -> None:
    state = state_with(add_file(run, "block-0", 1), visits_done=1)
    assert run.read_state() is None
    run.commit(state)
    assert run.read_state() == state


def test_a_commit_cut_off_before_the_move_leaves_the_old_state_and_its_files(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = state_with(add_file(run, "block-0", 1), visits_done=1)
    run.commit(old)
    new = state_with(add_file(run, "block-0", 2), visits_done=2)

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


def test_a_commit_keeps_its_files_and_those_of_the_commit_before_and_removes_older_ones(run: RunDir) -> None:
    states = [commit_visit(run, visit) for visit in (1, 2, 3)]
    assert run.read_previous() == states[1]
    assert [name for name in names_in(run.path) if name.endswith(".safetensors")] == [
        run.file_name("block-0", 2),
        run.file_name("block-0", 3),
    ]


def test_a_commit_that_keeps_no_other_removes_the_one_before_with_its_files(run: RunDir) -> None:
    commit_visit(run, 1)
    second = commit_visit(run, 2)
    assert run.read_previous() is not None
    third = state_with(add_file(run, "block-0", 3), visits_done=3)
    run.commit(third, keep_previous=False)
    assert (run.read_state(), run.read_previous()) == (third, None)
    left = [name for name in names_in(run.path) if name.endswith(".safetensors")]
    assert left == [run.file_name("block-0", 3)]
    assert second.files != third.files


def test_a_commit_of_figures_alone_leaves_the_commit_before_as_it_is(run: RunDir) -> None:
    first, second = (commit_visit(run, visit) for visit in (1, 2))
    run.commit(second.model_copy(update={"metrics": {"value": float("nan")}}))
    assert run.read_previous() == first
    found = run.read_state()
    assert found is not None and found.metrics == {"value": None}, "JSON has no NaN"


def test_a_run_removes_only_files_that_carry_its_identity(run: RunDir) -> None:
    foreign = {
        "my-finetune.safetensors",
        "block-0000.000001.safetensors",
        "block-0000.000001.0123456789abcdef.safetensors",
        f"copy-of-{run.file_name('block-0', 1)}",
        f".state.json.0123456789abcdef-{'0' * 16}.tmp",
        "notes.tmp",
    }
    for name in foreign:
        (run.path / name).write_bytes(b"theirs")
    own = [
        run.file_name("block-7", 0),
        run.file_name(SHARED_KEY, 0),
        run.file_name(BASE_KEY, 0),
        f".state.json.{run.identity}-{'0' * 16}.tmp",
    ]
    for name in own:
        (run.path / name).write_bytes(b"")
    run.commit(state_with(add_file(run, "block-0", 2), visits_done=9))
    left = set(names_in(run.path))
    assert foreign <= left and not left & set(own)
    assert all((run.path / name).read_bytes() == b"theirs" for name in foreign)


def test_files_of_later_visits_survive_a_commit_and_go_when_the_run_goes_on(run: RunDir) -> None:
    """They are being written while the visit before is committed; a process that begins finds them torn."""
    for key, visits in (("block-0", 0), ("block-0", 2), ("shared", 12)):
        add_file(run, key, visits)
    state = commit_visit(run, 1)
    expected = {run.file_name("block-0", 1), run.file_name("block-0", 2), run.file_name("shared", 12)}
    assert {name for name in names_in(run.path) if name.endswith(".safetensors")} == expected
    run.remove_leftovers(state)
    assert [name for name in names_in(run.path) if name.endswith(".safetensors")] == [
        run.file_name("block-0", 1)
    ]


def test_leftovers_of_a_run_without_a_commit_are_removed_when_it_begins_again(run: RunDir) -> None:
    add_file(run, "shared", 0)
    run.begin()
    assert not list(run.path.glob("*.safetensors"))


def test_block_files_without_a_state_are_refused_and_kept(run: RunDir) -> None:
    run.commit(state_with(add_file(run, "block-0", 0)))
    run.state_path.unlink()
    before = names_in(run.path)
    with pytest.raises(StoreError, match="state.json: missing, beside 1 block files"):
        run.begin()
    assert names_in(run.path) == before


# ------------------------------------------------------------------------------------------------------------
# The seal


@pytest.mark.parametrize("name", ["state.json", "plan.json"])
def test_no_changed_byte_of_the_plan_or_the_state_goes_unseen(run: RunDir, name: str) -> None:
    state = state_with(add_file(run, "block-0", 1), visits_done=1)
    run.commit(state)
    path, plan = run.path / name, run.read_plan()
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        try:  # a changed blank between two values changes nothing
            assert (RunDir(run.path).read_state(), RunDir(run.path).read_plan()) == (state, plan)
            assert name == "state.json" and content[position : position + 1].isspace()
        except LowmemError as refused:
            assert "\n" not in str(refused) and str(run.path) in str(refused)


def test_a_state_of_another_run_is_refused(run: RunDir, tmp_path: Path) -> None:
    other = RunDir(tmp_path / "other")
    other.path.mkdir()
    other.write_plan({"schema": 1, "recipe": {"method": "end_to_end"}})
    other.begin()
    run.state_path.write_bytes(other.state_path.read_bytes())
    with pytest.raises(StoreError, match="of another run than plan.json"):
        run.read_state()


@pytest.mark.parametrize("text", ["", '{"schema": 2, "visits_do', "[]", '{"schema": 2, "surprise": 2}'])
def test_a_state_that_is_not_what_lowmem_writes_is_refused_in_one_line(run: RunDir, text: str) -> None:
    run.state_path.write_text(text)
    with pytest.raises(StoreError, match="state.json") as caught:
        run.read_state()
    assert "\n" not in str(caught.value)


def test_a_folder_of_another_schema_is_refused_with_both_numbers(run: RunDir) -> None:
    run.state_path.write_text('{"schema": 1}')
    with pytest.raises(ResumeError, match="of schema 1; this version reads schema 2"):
        run.read_plan()
    run.state_path.unlink()
    run.plan_path.write_text('{"schema": 1, "recipe": {}}')  # as version 0.1 wrote it
    with pytest.raises(ResumeError, match="of schema 1; this version reads schema 2"):
        run.read_plan()


def test_another_plan_for_the_same_run_is_sealed_anew_and_killed_at_any_write_the_run_is_whole(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [commit_visit(run, visit) for visit in (1, 2)]
    old, new, real = run.read_plan(), {"schema": 1, "recipe": {"method": "other"}}, os.replace
    for killed_at in range(7):
        moves = iter(range(100))

        def replace(source: Path, target: Path, moves: Iterator[int] = moves, last: int = killed_at) -> None:
            if next(moves) == last:
                raise OSError(errno.EIO, "killed")
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            RunDir(run.path).replace_plan(new)
        except StoreError:
            assert killed_at < 6
        assert RunDir(run.path).read_plan() in (old, new)
        assert [run.read_previous(), run.read_state()] == states
    assert run.read_plan() == new and killed_at == 6


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "state.json", "x.safetensors\n"]
)
def test_a_state_that_names_a_file_outside_the_folder_is_refused(run: RunDir, name: str) -> None:
    record = FileRecord.model_construct(name=name, num_bytes=0, header=ZEROS, digest=ZEROS)
    run._replace_state(RunState.model_construct(files={"block-0": record}))
    with pytest.raises(StoreError, match="files.block-0.name"):
        run.read_state()


# ------------------------------------------------------------------------------------------------------------
# Whose folder it is


@pytest.mark.parametrize("name", ["my-finetune.safetensors", "lock", "state.json", ".hidden", "folder/"])
def test_a_folder_with_other_files_and_no_plan_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    if name.endswith("/"):
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(b"theirs")
    before = names_in(tmp_path)
    with pytest.raises(ResumeError, match="no run's folder.*nothing was written"):
        RunDir(tmp_path).acquire()
    assert names_in(tmp_path) == before


def test_a_foreign_plan_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"sprint": 12}')
    with pytest.raises(ResumeError, match="this version reads schema 2"):
        RunDir(tmp_path).acquire()
    assert names_in(tmp_path) == ["plan.json"]


def test_a_folder_in_which_a_run_was_killed_before_its_plan_is_taken(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / f".plan.json.{'a' * 16}-{'0' * 16}.tmp").write_bytes(b"{")
    run = RunDir(tmp_path)
    run.acquire()
    run.release()


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "\ud800", "file/below"])
def test_a_path_that_cannot_be_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResumeError) as caught:
        RunDir(tmp_path / name).acquire()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600 and "--run-dir" in str(caught.value)


def test_new_folders_are_on_the_disk_before_anything_is_written_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, real = list[int](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), real(handle)))
    run = RunDir(tmp_path / "a" / "b")
    run.acquire()
    assert {tmp_path.stat().st_ino, (tmp_path / "a").stat().st_ino} <= set(synced)
    run.release()


# ------------------------------------------------------------------------------------------------------------
# The lock


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


def test_to_look_at_the_lock_makes_no_file(run: RunDir) -> None:
    before = names_in(run.path)
    assert not run.is_locked()
    assert names_in(run.path) == before


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_a_lock_that_is_no_file_is_refused_in_one_line_and_a_link_is_not_followed(
    run: RunDir, tmp_path: Path, kind: str
) -> None:
    theirs, lock = tmp_path / "theirs", run.path / "lock"
    theirs.write_bytes(b"theirs")
    {"folder": lock.mkdir, "link": lambda: lock.symlink_to(theirs), "pipe": lambda: os.mkfifo(lock)}[kind]()
    assert not run.is_locked()
    with pytest.raises(ResumeError, match="lock") as caught:
        run.acquire()
    assert "\n" not in str(caught.value) and theirs.read_bytes() == b"theirs"


# ------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("truncate", "found 5 bytes"),
        ("grow", "found 9 bytes"),
        ("remove", "found no file"),
        ("link", "found no file"),
    ],
)
def test_a_damaged_file_is_named_with_expected_and_found_sizes(run: RunDir, damage: str, found: str) -> None:
    good, bad = add_file(run, "block-0", 1), add_file(run, "block-1", 2)
    state, path = state_with(good, bad), run.path / bad.name
    run.check_files(state)
    if damage == "remove":
        path.unlink()
    elif damage == "link":
        path.rename(run.path / "elsewhere")
        path.symlink_to("elsewhere")
    else:
        path.write_bytes(bytes(5 if damage == "truncate" else 9))
    with pytest.raises(StoreError, match=found) as caught:
        run.check_files(state)
    assert bad.name in str(caught.value) and "expected 8 bytes" in str(caught.value)


@pytest.mark.parametrize("call", ["unlink", "fsync", "replace", "open", "listdir", "stat"])
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
def test_a_fault_of_any_call_in_a_commit_is_one_line_and_the_old_or_the_new_state_counts(
    run: RunDir, call: str, fault: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [commit_visit(run, visit) for visit in (1, 2)]
    real, faults = getattr(os, call), 0
    for moment in range(12):
        calls = iter(range(1000))

        def faulty(
            *args: object, calls: Iterator[int] = calls, last: int = moment, **named: object
        ) -> object:
            if next(calls) == last:
                raise OSError(fault, os.strerror(fault), *args[:1])
            return real(*args, **named)

        states.append(state_with(add_file(run, "block-0", moment + 3), visits_done=moment + 3))
        with monkeypatch.context() as patch:
            patch.setattr(os, call, faulty)
            try:
                run.commit(states[-1])
                continue
            except LowmemError as problem:
                faults += 1
                assert os.strerror(fault) in str(problem) and str(run.path) in str(problem)
                assert "\n" not in str(problem)
        found = run.read_state()
        assert found is not None and found in states[-2:]
        run.check_files(found)
        run.commit(states[-1])  # when it is mended
    assert faults > 0


def test_a_folder_without_a_plan_is_not_a_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(ResumeError, match="no plan.json"):
        run.read_plan()
    run.write_plan({"schema": 1, "recipe": {"method": "end_to_end"}})
    assert run.read_plan() == {"schema": 1, "recipe": {"method": "end_to_end"}}


def test_file_names_sort_by_block_and_visit_and_are_accepted_in_a_state(run: RunDir) -> None:
    names = [run.file_name("block-3", 12), run.file_name("shared", 0)]
    assert names == [
        f"block-0003.000012.{run.identity}.safetensors",
        f"shared.000000.{run.identity}.safetensors",
    ]
    for name in names:
        assert FileRecord(name=name, num_bytes=0, header=ZEROS, digest=ZEROS).name == name
        assert run.is_ours(name) and not RunDir(run.path).is_ours(name)


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
