"""Races and faults of a streamed run: it goes on, or it stops at the last commit with one clear line, and
nothing is lost.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT, recipe_with
from racing import race, race_plan
from torch import Tensor

from lowmem.blocks import staging
from lowmem.blocks.block_file import ChunkRequests
from lowmem.blocks.run_dir import RunDir, RunState
from lowmem.blocks.staging import Ring
from lowmem.data.datasets import describe_data, load_data
from lowmem.errors import StoreError
from lowmem.machine.profile import Profile, load_profile
from lowmem.models import model_builder
from lowmem.planning.plan import make_plan
from lowmem.reporting.report import digest, read_report
from lowmem.reporting.telemetry import Recorder, read_records
from lowmem.training import open_run
from lowmem.training.trainer import Trainer
from lowmem.units import MIB

ROWS, STEPS, TIMES = 6_000, 2, 50


@pytest.mark.parametrize(
    ("through", "num_blocks"), [("slots", 2), pytest.param("ring", 3, marks=pytest.mark.slow)]
)
def test_copies_that_compute_outruns_still_bring_the_right_bytes_50_times(
    tmp_path: Path, through: str, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ring`: blocks pass chunks into two slots, as on CUDA."""
    monkeypatch.setattr(staging, "CHUNK_BYTES", MIB // 2)  # some chunks a block
    if through == "ring":
        monkeypatch.setattr(open_run, "_open_ring", lambda plan, device, layouts: Ring(device, MIB))
    profile = load_profile("cpu-4gib")
    expected = race(tmp_path / "resident", race_plan(profile, num_blocks, ROWS, STEPS, tier="device"), ROWS)
    plan = race_plan(profile, num_blocks, ROWS, STEPS, tier="disk", prefetch=True, write_back="beside")
    for _ in range(TIMES):
        assert race(tmp_path / "run", plan, ROWS) == expected
        shutil.rmtree(tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------
# A full disk

RUN = {**SHORT, "offload__tier": "disk", "offload__write_back": "beside", "model__dim": 64}


def run_short(folder: Path, listeners: Any = ()) -> RunState:
    """A short run whose plan did not look at the disk, as if that had become full, or small, only later."""
    recipe = recipe_with(**RUN)
    build, data = (
        model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len)),
        load_data(recipe.data, recipe.train.seq_len),
    )
    plan = make_plan(build, recipe, load_profile("cpu-4gib"))
    return Trainer(build, plan, folder, listeners).fit(
        lambda step: data.batch(0, step, recipe.train.batch_size)
    )


@contextlib.contextmanager
def small_disk(num_bytes: int) -> Iterator[Path]:
    """A file system of its own."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", folder], capture_output=True
        )
        if mounted.returncode:
            pytest.skip("may not mount a file system here")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def fill(path: Path) -> None:
    """Takes all the space that is left."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def stopped_once_full(folder: Path, become_full: Any) -> int:
    """Runs until the disk is full; returns the visits that are then committed.

    All files of the last commit must still be there.
    """

    def at_the_fourth_commit(record: dict[str, Any]) -> None:
        if record["event"] == "commit" and record["visits_done"] == 4:
            become_full()

    with pytest.raises(StoreError, match="No space left on device; the last commit is kept") as stopped:
        run_short(folder, [at_the_fourth_commit])
    assert stopped.value.exit_code == 1 and "\n" not in str(stopped.value)
    state = RunDir(folder).read_state()
    assert state is not None
    RunDir(folder).check_files(state)
    kept = RunDir(folder).kept_names(state)
    assert {path.name for path in folder.glob("*.safetensors")} == kept, "no part of a file is left"
    return state.visits_done


def test_a_full_disk_stops_the_run_at_the_last_commit_and_it_goes_on_when_there_is_space(
    tmp_path: Path,
) -> None:
    unbroken = run_short(tmp_path / "unbroken")
    with small_disk(64 * MIB) as disk:
        run, ballast = disk / "run", disk / "ballast"
        assert stopped_once_full(run, lambda: fill(ballast)) == 4
        with pytest.raises(StoreError, match="No space left"):
            run_short(run)
        ballast.unlink()
        assert digest(run_short(run)) == digest(unbroken)


def test_a_disk_that_is_full_after_some_bytes_stops_the_run_at_the_last_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = run_short(tmp_path / "unbroken")
    real, space = ChunkRequests.write, [10**9]

    def write(self: ChunkRequests, path: Path, position: int, chunk: Tensor) -> None:
        space[0] -= chunk.numel()
        if space[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, path, position, chunk)

    monkeypatch.setattr(ChunkRequests, "write", write)
    assert stopped_once_full(tmp_path / "run", lambda: space.__setitem__(0, 10_000)) == 4
    space[0] = 10**9
    assert digest(run_short(tmp_path / "run")) == digest(unbroken)


def test_records_that_find_no_space_are_dropped_and_those_after_them_are_whole(tmp_path: Path) -> None:
    with small_disk(MIB) as disk:
        recorder = Recorder(disk / "t.jsonl")
        recorder.write("before")
        fill(disk / "ballast")
        for number in range(1000):  # the file's last page may still take some
            recorder.write("lost", number=number)
        (disk / "ballast").unlink()
        recorder.write("after", text="x")
        recorder.close()
        records = [record for record in read_records(disk / "t.jsonl") if record["event"] != "lost"]
        assert [record["event"] for record in records] == ["before", "after"]


# ------------------------------------------------------------------------------------------------------------
# A slow disk, and one without O_DIRECT


def paced(read_gib_per_s: float, write_gib_per_s: float) -> Profile:
    profile = load_profile("cpu-4gib")
    disk = profile.disk.model_copy(
        update={"read_gib_per_s": read_gib_per_s, "write_gib_per_s": write_gib_per_s}
    )
    return profile.model_copy(update={"disk": disk})


def test_a_slow_disk_changes_the_time_and_not_the_digest_and_the_report_says_what_to_do(
    tmp_path: Path,
) -> None:
    expected = race(
        tmp_path / "resident", race_plan(load_profile("cpu-4gib"), 3, ROWS, STEPS, tier="device"), ROWS
    )
    profile = paced(0.02, 0.01)
    plan = race_plan(profile, 3, ROWS, STEPS, tier="disk", write_back="beside", pace=True)
    assert race(tmp_path / "slow", plan, ROWS) == expected
    content = read_report(tmp_path / "slow").content
    stream, traffic = content["stream"], content["traffic"]
    state = RunDir(tmp_path / "slow").read_state()
    assert state is not None
    read_rate, write_rate = profile.disk_rates
    # Headers and the shared part are not paced; together they are less than all files.
    headers = sum(record.num_bytes for record in state.files.values())
    assert state.transfer_s.disk_read_s >= (traffic["disk_read_bytes"] - headers) / read_rate  # type: ignore[operator]
    assert stream["disk_written_bytes_per_s"] <= 1.1 * write_rate  # type: ignore[operator]
    assert stream["exposed_share"] > 0.01
    assert (
        "raise blocks.visit_steps from 1 to" in stream["advice"]
        and "offload.tier: device" in stream["advice"]
    )
    assert stream["advice"] in read_report(tmp_path / "slow").table()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs")
def test_a_run_on_a_file_system_in_memory_has_the_digest_of_one_on_a_disk(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert digest(run_short(Path(folder) / "run")) == digest(run_short(tmp_path / "disk"))
