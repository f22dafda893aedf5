"""Real processes, killed for real: the same command again ends with the digest of the unbroken run."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import pytest
from crash_child import finetune_short, train_short
from hf_folders import chat_model, chat_rows

from lowmem.blocks.run_dir import RunDir
from lowmem.reporting.report import digest
from lowmem.reporting.telemetry import read_records

VISIT_STEPS = 8
RUN = {
    "model__num_layers": 3,
    "model__dim": 32,
    "train__num_steps": 40,
    "train__batch_size": 32,
    "blocks__visit_steps": VISIT_STEPS,
    "optimizer__name": "adamw8bit",
    "offload__tier": "disk",
}
# Streamed: layer after layer in every step, beside one that stays and one whose weights do.
STAYING = {"offload__resident_layers": 1, "offload__resident_weights": 1}
WHOLE = {**RUN, "method": "end_to_end", **STAYING}
RESTING = {**WHOLE, "offload__shared": "tier"}
# Block after block in every two steps, beside one that stays
SWEPT = {**WHOLE, "blocks__sweep_steps": 2, "offload__resident_weights": 0}
# One block after another, trained by the whole model's gradients
TURNED = {**RUN, "method": "block_coordinate", "blocks__num_blocks": 3, "blocks__visit_batches": 1}
# The first block alone, then copied to the others in one commit.
GROWN = {**WHOLE, "blocks__grow_at": 0.5, "blocks__visit_steps": 4}


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes forked from a server that has imported everything and computed nothing, so that a start costs
    milliseconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "lowmem.training.trainer",
            "lowmem.inference.evaluate",
            "bitsandbytes.functional",
            "sklearn.datasets",
            "sklearn.model_selection",
            "lowmem.finetuning",
            "peft",
            "transformers.models.llama.modeling_llama",
        ]
    )
    return context


def start(
    processes: Any, folder: Path, overrides: dict[str, Any], die_at: tuple[str, int] | None = None
) -> Any:
    process = processes.Process(target=train_short, args=(str(folder), overrides, die_at))
    process.start()
    return process


def final_digest(folder: Path, visits: int = 15) -> str | None:
    state = RunDir(folder).read_state()
    assert state is not None and state.visits_done == visits
    return digest(state)


def assert_only_kept_files(folder: Path) -> None:
    run = RunDir(folder)
    assert {path.name for path in folder.glob("*.safetensors")} == run.kept_names(run.read_state())


def repeated_steps(folder: Path) -> list[int]:
    """Counts, for each process of a run but the last, the steps that the next one had to make again because
    they were not committed.
    """
    sessions: list[list[dict[str, Any]]] = []
    for record in read_records(RunDir(folder).telemetry_path):
        if record["event"] == "open":
            sessions.append([])
        sessions[-1].append(record)
    repeated = []
    for session, following in zip(sessions, sessions[1:], strict=False):
        steps = [record for record in session if record["event"] == "step"]
        repeated.append(sum(record["visit"] >= following[0]["visits_done"] for record in steps))
    return repeated


@pytest.mark.slow  # the two tests below die at every fsync and at every write, each time at the same one
@pytest.mark.parametrize(
    "run, write_back, kills", [(RUN, "auto", 10), (RUN, "beside", 5), (WHOLE, "auto", 5)]
)
def test_killed_at_random_moments_a_run_ends_with_the_unbroken_digest(
    tmp_path: Path, processes: Any, run: dict[str, Any], write_back: str, kills: int
) -> None:
    overrides, visits = {**run, "offload__write_back": write_back}, 5 if run is WHOLE else 15
    for name in ("warm-up", "unbroken"):  # the first also starts the server
        started = time.monotonic()
        process = start(processes, tmp_path / name, overrides)
        process.join()
        whole_s = time.monotonic() - started
        assert process.exitcode == 0
    expected = final_digest(tmp_path / "unbroken", visits)

    moments = random.Random(1)
    killed = runs = 0
    while killed < kills:
        folder = tmp_path / f"run-{runs}"
        runs += 1
        while True:  # the same command again, until it ends by itself
            process = start(processes, folder, overrides)
            process.join(moments.uniform(0.02, 0.8) * whole_s if killed < kills else None)
            if process.exitcode is None:
                process.kill()
                process.join()
            if process.exitcode == -9:
                killed += 1
                continue
            assert process.exitcode == 0
            break
        assert final_digest(folder, visits) == expected
        # Where files are written beside compute, also the steps made meanwhile.
        most = VISIT_STEPS if write_back == "auto" and run is RUN else 2 * VISIT_STEPS
        assert all(repeated <= most for repeated in repeated_steps(folder))
        assert_only_kept_files(folder)


@pytest.mark.parametrize(
    ("run", "moments"),
    [
        (RUN, range(0, 24, 3)),
        pytest.param(GROWN, range(7, 26, 6), marks=pytest.mark.slow),
        *(pytest.param(run, range(24), marks=pytest.mark.slow) for run in (RUN, GROWN)),
    ],
)
def test_killed_at_an_fsync_of_the_first_visits_a_run_ends_with_the_unbroken_digest(
    tmp_path: Path, processes: Any, run: dict[str, Any], moments: range
) -> None:
    """Before the first file, between two files, between files and folder, before and after state.json is
    replaced.
    """
    overrides = {**run, "train__num_steps": 16}
    unbroken = start(processes, tmp_path / "unbroken", overrides)
    unbroken.join()
    state = RunDir(tmp_path / "unbroken").read_state()
    assert state is not None
    deaths = 0
    for moment in moments:
        folder = tmp_path / f"dies-at-{moment}"
        first = start(processes, folder, overrides, ("fsync", moment))
        first.join()
        deaths += first.exitcode == -9
        second = start(processes, folder, overrides)
        second.join()
        assert second.exitcode == 0
        resumed = RunDir(folder).read_state()
        assert resumed is not None and digest(resumed) == digest(state)
    assert deaths == len(moments)


@pytest.mark.parametrize("kills", [4, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "run",
    [WHOLE, pytest.param(RESTING, marks=pytest.mark.slow), SWEPT, TURNED],
    ids=["steps", "steps, shared part too", "sweeps", "turns"],
)
def test_killed_at_a_write_of_a_step_through_the_whole_model_no_block_is_ahead_of_the_others(
    tmp_path: Path, processes: Any, run: dict[str, Any], kills: int
) -> None:
    """Two visits of two steps, or of two sweeps of two steps: the first files, then in each step the rows of
    every layer that streams, or in each sweep every block. Or two visits of each of three blocks.

    At each commit those of the layer that stays, and the shared part, are written too.
    """
    steps, least = (4, 20) if run is SWEPT else (2, 20 if run is TURNED else 40)
    visits = 6 if run is TURNED else 2
    overrides = {
        **run,
        "train__num_steps": 2 * steps,
        "train__warmup_steps": 0,
        "blocks__visit_steps": steps,
    }
    start(processes, tmp_path / "unbroken", overrides, ("write", -1)).join()
    writes = int((tmp_path / "unbroken.count").read_text())
    assert writes > least
    for moment in range(8, writes, max(writes // kills, 1)):
        folder = tmp_path / f"dies-at-{moment}"
        first = start(processes, folder, overrides, ("write", moment))
        first.join()
        assert first.exitcode == -9
        second = start(processes, folder, overrides)
        second.join()
        assert second.exitcode == 0
        assert final_digest(folder, visits) == final_digest(tmp_path / "unbroken", visits)
        assert_only_kept_files(folder)


@pytest.mark.parametrize("kills", [2, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "adapter", [[], ["adapter.name=lora", "adapter.base=nf4"]], ids=["all parameters", "adapter"]
)
def test_killed_at_a_write_a_decoder_that_is_fine_tuned_on_packed_rows_ends_with_the_unbroken_digest(
    tmp_path: Path, processes: Any, adapter: list[str], kills: int
) -> None:
    """The first writes make the store of frozen layers, where there is an adapter."""
    model, rows = chat_model(tmp_path / "llama", "llama"), chat_rows(tmp_path / "rows.jsonl")
    short = ["train.num_steps=6", "train.seq_len=48", "train.batch_size=4", "blocks.visit_steps=2"]
    overrides = [*short, "train.lr=0.01", "data.pack=true", "offload.tier=disk", *adapter]

    def run(name: str, die_at: tuple[str, int] | None = None) -> Any:
        arguments = (str(tmp_path / name), str(model), str(rows), overrides, die_at)
        process = processes.Process(target=finetune_short, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    assert run("unbroken", ("write", -1)) == 0
    writes = int((tmp_path / "unbroken.count").read_text())
    assert writes > 12
    for moment in range(1, writes, max(writes // kills, 1)):
        name = f"dies-at-{moment}"
        assert run(name, ("write", moment)) == -9
        assert run(name) == 0
        assert final_digest(tmp_path / name, 3) == final_digest(tmp_path / "unbroken", 3)
        assert_only_kept_files(tmp_path / name)
