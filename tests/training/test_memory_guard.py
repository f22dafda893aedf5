"""A run takes no memory that is not there: refused before it begins, stopped at a commit, or gone on with
smaller micro-batches.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, as_overrides, recipe_with, run_short
from torch._subclasses.fake_tensor import FakeTensor

from lowmem.blocks.run_dir import RunDir
from lowmem.data.datasets import describe_data
from lowmem.errors import BudgetError, ShortageError
from lowmem.machine.profile import load_profile
from lowmem.models import model_builder
from lowmem.objectives.labels import LabelDenoising
from lowmem.planning.plan import make_plan
from lowmem.reporting.report import digest, read_report
from lowmem.reporting.telemetry import read_records
from lowmem.training import memory_guard as guard
from lowmem.training.trainer import Trainer
from lowmem.units import GIB, MIB

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_a_run_that_asks_for_a_gibibyte_more_than_is_available_is_refused_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with(**SHORT)
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    plan = make_plan(build, recipe, load_profile("cpu-16gib"), tmp_path)
    monkeypatch.setattr(guard, "available_bytes", lambda: 4 * GIB)
    asked = plan.predicted.model_copy(update={"host_peak_bytes": guard.held_bytes() + 5 * GIB})
    large = plan.budget.model_copy(update={"host_bytes": 1 << 50})
    with pytest.raises(
        BudgetError, match=r"needs .* GiB more of the host; the machine has .* GiB available now"
    ) as caught:
        Trainer(build, plan.model_copy(update={"predicted": asked, "budget": large}), tmp_path / "run").fit(
            lambda step: {}
        )
    assert caught.value.exit_code == 3 and "device peak" in caught.value.table
    assert not (tmp_path / "run" / "plan.json").exists()


def test_a_finished_run_is_no_run_to_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = run_short(tmp_path)
    monkeypatch.setattr(guard, "available_bytes", lambda: 0)
    assert run_short(tmp_path) == finished


def test_out_of_memory_before_the_first_visit_is_said_to_be_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("lowmem.training.attempt.create_weights", failing)
    with pytest.raises(ShortageError, match="^before the first visit: out of memory"):
        run_short(tmp_path)


def test_memory_taken_by_another_process_stops_the_run_at_a_commit_and_it_resumes_to_the_same_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the machine has left is read here from a list, so that no other process can decide the test."""
    unbroken = run_short(tmp_path / "unbroken")
    machine = load_profile("cpu-4gib")
    least, left = machine.min_available_bytes, [8 * GIB]
    monkeypatch.setattr("lowmem.machine.monitor.available_bytes", lambda: left[0])
    monkeypatch.setattr("lowmem.machine.monitor.SYSTEM_SAMPLES", 1)

    def take(record: dict[str, Any]) -> None:
        if record["event"] == "visit" and record["visit"] == 2:
            left[0] = least - MIB  # too little, but enough to end the visit

    with pytest.raises(
        ShortageError, match=r"of memory left; allowed: .* stopped before it swaps, the last commit is kept"
    ):
        run_short(tmp_path / "run", [take], machine)
    state = RunDir(tmp_path / "run").read_state()
    assert state is not None and state.visits_done == 3, "the visit under way was finished and committed"
    left[0] = 8 * GIB
    assert digest(run_short(tmp_path / "run", profile=machine)) == digest(unbroken)


def test_with_much_too_little_left_a_run_does_not_wait_for_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.machine.monitor.available_bytes", lambda: 100 * MIB)
    with pytest.raises(ShortageError, match=r"100\.0 MiB of memory left"):
        run_short(tmp_path / "run")
    state = RunDir(tmp_path / "run").read_state()
    assert state is not None and state.visits_done == 0


# ------------------------------------------------------------------------------------------------------------
# An allocation that fails


def fail_above(monkeypatch: pytest.MonkeyPatch, samples: int, problem: BaseException) -> None:
    loss = LabelDenoising.block_loss

    def failing(self: Any, layers: Any, batch: Any, *rest: Any) -> Any:
        if len(batch["label"]) > samples and not isinstance(
            batch["label"], FakeTensor
        ):  # not where a pass is counted
            raise problem
        return loss(self, layers, batch, *rest)

    monkeypatch.setattr(LabelDenoising, "block_loss", failing)


OOMS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 9 bytes."
    ),
    MemoryError(),
]


@pytest.mark.parametrize("problem", OOMS, ids=["cuda", "cpu", "python"])
def test_out_of_memory_loses_no_commit_and_says_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    fail_above(monkeypatch, 16, problem)
    with pytest.raises(ShortageError) as caught:
        run_short(tmp_path / "run")
    message = str(caught.value)
    assert (
        message.startswith("visit 0, block 0: out of memory at micro-batch 64; predicted peak ")
        and "\n" not in message
    )
    assert (
        "measured" in message
        and "train.on_oom: shrink, which goes on from there with micro-batches of 32" in message
    )
    state = RunDir(tmp_path / "run").read_state()
    assert state is not None and state.visits_done == 0


def test_another_error_is_not_taken_for_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_above(monkeypatch, 16, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_short(tmp_path / "run", train__on_oom="shrink")


def test_shrink_halves_the_micro_batch_until_it_fits_and_ends_like_a_run_planned_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = run_short(tmp_path / "planned", train__micro_batch_size=16)
    fail_above(monkeypatch, 16, OOMS[0])
    with pytest.raises(ShortageError):
        run_short(tmp_path / "run")
    state = run_short(
        tmp_path / "run", train__on_oom="shrink"
    )  # the one key that may change from one process to the next
    assert digest(state) == digest(planned)
    assert state.micro_batch_size == 16
    report = read_report(tmp_path / "run")
    assert report.content["settings"]["micro_batch_size"] == 16 and "micro-batch 16" in report.table()
    warnings = [
        record["message"]
        for record in read_records(RunDir(tmp_path / "run").telemetry_path)
        if record["event"] == "warning"
    ]
    assert warnings == [f"out of memory: on from visit 0 with micro-batches of {size}" for size in (32, 16)]


def test_shrink_gives_up_where_a_single_sample_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_above(monkeypatch, 0, OOMS[0])
    with pytest.raises(ShortageError, match="at micro-batch 1; "):
        run_short(tmp_path / "run", train__on_oom="shrink")


def test_a_shrunk_run_interrupted_goes_on_with_its_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(record: dict[str, Any]) -> None:
        if record["event"] == "step" and record["visit"] == 4:
            raise Interrupted

    planned = run_short(tmp_path / "planned", train__micro_batch_size=32)
    fail_above(monkeypatch, 32, OOMS[0])
    with pytest.raises(Interrupted):
        run_short(tmp_path / "run", [interrupt], train__on_oom="shrink")
    monkeypatch.undo()
    assert digest(run_short(tmp_path / "run", train__on_oom="shrink")) == digest(planned)


@pytest.mark.skipif(
    not hasattr(resource, "RLIMIT_DATA") or sys.platform != "linux", reason="needs RLIMIT_DATA"
)
@pytest.mark.parametrize("on_oom", ["stop", pytest.param("shrink", marks=pytest.mark.slow)])
def test_an_allocation_that_really_fails_stops_the_command_with_one_line_or_shrinks(
    tmp_path: Path, on_oom: str
) -> None:
    """The plan is made for a machine larger than what the process is then allowed."""
    settings = as_overrides(
        train__num_steps=2,
        train__batch_size=1024,
        blocks__visit_steps=2,
        train__warmup_steps=0,
        eval__num_batches=1,
    )
    settings += ["model.patch_size=1", f"train.on_oom={on_oom}", "train.recompute=false", "offload.tier=disk"]
    command = [
        sys.executable,
        "-m",
        "lowmem",
        "train",
        "digits-vit",
        "--profile",
        "cpu-16gib",
        "--run-dir",
        str(tmp_path / "run"),
        "--quiet",
        "--json",
    ]
    for setting in settings:
        command += ["--set", setting]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (900 * MIB, 900 * MIB))  # of 1,080 MiB planned

    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    if on_oom == "stop":
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith(
            "error: visit 0, block 0: out of memory at micro-batch 1024"
        )
    else:
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["settings"]["micro_batch_size"] < 1024
        assert report["progress"]["visits_done"] == report["progress"]["visits_total"]


TAKE = "held = b'1' * (int(__import__('sys').argv[1]) << 20)"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a memory cgroup or RLIMIT_DATA")
def test_a_hard_limit_of_ones_own_ends_a_process_that_goes_over_it_and_no_other() -> None:
    memory_limit = runpy.run_path(str(SCRIPTS / "memory_limit.py"))["memory_limit"]
    with memory_limit(256 * MIB, "test") as limit:
        ends = [
            subprocess.run(
                [sys.executable, "-c", TAKE, str(mib)], preexec_fn=limit.enter, capture_output=True
            ).returncode
            for mib in (64, 512)
        ]
        peak = limit.peak_bytes()
    assert ends[0] == 0 and ends[1] != 0
    assert peak is None or 64 * MIB < peak <= 256 * MIB


def test_the_next_smaller_micro_batch_divides_the_one_before() -> None:
    assert [guard.next_smaller(size) for size in (64, 12, 9, 7, 1)] == [32, 6, 3, 1, None]
