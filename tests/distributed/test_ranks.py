"""Several processes on one machine: the single process's bits, one commit, and what happens when one dies."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT, recipe_with
from starting import command, outcome, ranks_of, recipe_file, trained, wait_for, wait_for_visits
from test_rounds import TOGETHER, on_ranks

from lowmem.blocks.lock import FolderLock
from lowmem.blocks.run_dir import RunDir
from lowmem.cluster import shared_bytes_of
from lowmem.data.datasets import describe_data, identify_data
from lowmem.distributed import agreement
from lowmem.distributed.agreement import require_agreement
from lowmem.distributed.exchange import round_bytes
from lowmem.errors import LowmemError, ResumeError
from lowmem.machine.profile import load_profile
from lowmem.models import model_builder
from lowmem.planning.plan import Plan, make_plan, read_plan
from lowmem.reporting.report import read_report
from lowmem.training.ranks import Ranks


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe_file(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> str | None:
    """The digest of one process."""
    return trained(recipe, tmp_path_factory.mktemp("alone") / "run", 1)


def test_two_ranks_end_with_the_single_process_digest_and_report_as_one_run(
    recipe: Path, alone: str | None, tmp_path: Path
) -> None:
    assert trained(recipe, tmp_path / "run", 2) == alone
    content = read_report(tmp_path / "run").content
    assert content["metrics"] is not None and [block["steps"] for block in content["blocks"]] == [6] * 4
    assert [rank["rank"] for rank in content["ranks"]] == [0, 1]
    assert all(rank["device_peak_bytes"] > 0 for rank in content["ranks"])
    sent = content["traffic"]["exchanged_bytes"]
    assert sent == 3 * round_bytes(shared_bytes_of(read_plan(RunDir(tmp_path / "run"))), 4, 2) > 0
    assert sent == sum(rank["traffic"]["exchanged_bytes"] for rank in content["ranks"])
    assert "rank 1" in read_report(tmp_path / "run").table()
    visits = [
        json.loads(line)["blocks"][0]
        for line in (tmp_path / "run" / "telemetry-rank0001.jsonl").read_text().splitlines()
        if json.loads(line)["event"] == "visited"
    ]
    assert visits == [1, 3] * 3


def test_a_rank_that_dies_is_named_and_the_run_goes_on_with_other_ranks(
    recipe: Path, alone: str | None, tmp_path: Path
) -> None:
    with ranks_of([command(recipe, tmp_path / "run")] * 2) as started:
        wait_for_visits(tmp_path / "run", 4)
        started[1].kill()
        code, out, err = outcome(started[0])
    assert code == 1 and out == "" and err.startswith("error: rank 1 died; what is committed is kept")
    assert err.count("\n") == 1
    assert trained(recipe, tmp_path / "run", 3) == alone


SLOW_TO_LEAVE = """
import sys, time
from lowmem.blocks.run_dir import RunDir
from lowmem.cli import main

release = RunDir.release

def late(run):
    time.sleep(1.0 if "rank" in run._lock.path.name else 0.0)
    release(run)

RunDir.release = late
sys.exit(main())
"""


def test_rank_0_evaluates_when_all_others_have_left_the_folder(recipe: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", SLOW_TO_LEAVE, *command(recipe, tmp_path / "run")[3:]]
    with ranks_of([words] * 2) as started:
        ended = [outcome(process) for process in started]
    assert [code for code, _, _ in ended] == [0, 0], ended
    state = RunDir(tmp_path / "run").read_state()
    assert state is not None and state.metrics is not None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_rank_killed_at_a_random_moment_costs_no_bit(
    recipe: Path, alone: str | None, tmp_path: Path, seed: int
) -> None:
    draw, run = random.Random(seed), tmp_path / "run"
    size, going_on = draw.choice([2, 4]), [1, 2, 4][seed % 3]
    victim = draw.randrange(size)
    with ranks_of([command(recipe, run)] * size) as started:
        wait_for(run / "lock")  # all have joined
        time.sleep(draw.uniform(0.0, 6.0))
        started[victim].kill()
        ended = [outcome(process) for process in started]
    said = "".join(err for rank, (_, _, err) in enumerate(ended) if rank != victim)
    finished = all(code == 0 for rank, (code, _, _) in enumerate(ended) if rank != victim)
    assert finished or (said.count("error: ") == 1 and f"rank {victim} " in said), ended
    assert trained(recipe, run, going_on) == alone


@pytest.mark.slow
def test_k_steps_and_whole_runs_in_one_round_are_the_same_on_two_ranks_and_one(
    recipe: Path, tmp_path: Path
) -> None:
    options = ["--set", "blocks.visit_steps=1", "--set", "train.num_steps=2", "--set", "blocks.num_blocks=3"]
    assert trained(recipe, tmp_path / "two", 2, *options) == trained(recipe, tmp_path / "one", 1, *options)


def test_a_rank_with_another_recipe_is_one_line_on_rank_0_and_nothing_is_written(
    recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "deep" / "run"
    one, other = command(recipe, folder), command(recipe, folder, "--set", "train.lr=0.5")
    with ranks_of([one, other]) as started:
        ended = [outcome(process) for process in started]
    assert [code for code, _, _ in ended] == [2, 2]
    assert ended[0][2].startswith(
        "error: rank 1: recipe.train.lr: found 0.5; rank 0 has 0.002; allowed: the same"
    )
    assert ended[0][2].count("\n") == 1 and ended[1][1:] == ("", "")
    assert not folder.parent.exists()


# ------------------------------------------------------------------------------------------------------------
# What ranks must agree on, among threads


def plan_with(**changes: Any) -> Plan:
    recipe = recipe_with(**{**SHORT, **TOGETHER, **changes})
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    plan = make_plan(build, recipe, load_profile("cpu-4gib"))
    return plan.model_copy(update={"data": identify_data(recipe.data, recipe.train.seq_len)})


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_with()


def verdict(plans: list[Plan], folder: Path) -> str:
    """What rank 0 says about ranks with these plans."""
    found = on_ranks(len(plans), lambda ranks: require_agreement(ranks, plans[ranks.rank], folder))
    assert isinstance(found[0], LowmemError), found
    assert found[0].exit_code in (2, 3) and "\n" not in str(found[0])
    assert not folder.exists()
    return str(found[0])


def test_more_ranks_than_blocks_are_refused(plan: Plan, tmp_path: Path) -> None:
    assert "ranks: found 4 for 3 blocks; allowed: 1 to 3" in verdict([plan] * 4, tmp_path / "run")


def test_an_order_that_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    turns = plan_with(blocks__order="round_robin")
    assert "blocks.order: found 'round_robin' with 2 ranks; allowed: together" in verdict(
        [turns] * 2, tmp_path / "run"
    )


def test_other_data_on_a_rank_are_refused(plan: Plan, tmp_path: Path) -> None:
    assert plan.data is not None
    data = plan.data.model_copy(update={"fingerprint": "0" * 32})
    other = plan.model_copy(update={"data": data})
    assert "rank 1: data.fingerprint: found 0000" in verdict([plan, other], tmp_path / "run")


def test_another_version_on_a_rank_is_refused(plan: Plan, tmp_path: Path) -> None:
    def with_version(ranks: Ranks) -> None:
        gathered = ranks.gathered

        def spoilt(content: Any) -> list[Any]:
            speaks = not ranks.leads and isinstance(content, dict)
            return gathered({**content, "lowmem": "0.0.1"} if speaks else content)

        ranks.gathered = spoilt  # type: ignore[method-assign]
        require_agreement(ranks, plan, tmp_path / "run")

    found = on_ranks(2, with_version)
    assert "rank 1: lowmem: found 0.0.1; rank 0 has " in str(found[0])


def test_a_rank_that_does_not_see_the_folder_is_refused_and_the_folder_goes_again(
    plan: Plan, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "run"

    def call(ranks: Ranks) -> None:
        agreement._require_common_folder(ranks, folder if ranks.leads else tmp_path / "elsewhere")

    found = on_ranks(2, call)
    assert isinstance(found[0], ResumeError) and "rank 1: does not see run folder" in str(found[0])
    assert not folder.parent.exists()


def test_more_ranks_than_a_machine_has_room_for_are_refused(plan: Plan, tmp_path: Path) -> None:
    budget = plan.budget.model_copy(update={"device_bytes": 2 * plan.predicted.device_needed_bytes})
    tight = plan.model_copy(update={"budget": budget})
    assert "3 ranks on" in verdict([tight] * 3, tmp_path / "run")


def test_a_folder_in_which_a_rank_of_an_earlier_launch_still_runs_is_refused(tmp_path: Path) -> None:
    rank = FolderLock(tmp_path / "lock-rank0002")
    assert rank.acquire()
    with pytest.raises(ResumeError, match="another process is training in it"):
        RunDir(tmp_path).lock()
    rank.release()
    run = RunDir(tmp_path)
    run.lock()
    run.release()
