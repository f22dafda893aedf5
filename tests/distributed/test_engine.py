"""DeepSpeed's engine: the single process's loss curve and weights, and a run that moves between the two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, recipe_with
from safetensors.torch import load_file
from starting import command, outcome, ranks_of, trained, wait_for_visits
from torch import Tensor

from lowmem.blocks.run_dir import RunDir
from lowmem.data.datasets import describe_data, load_data
from lowmem.distributed.engine import engine_config, engine_refusal
from lowmem.inference.export import export_run
from lowmem.machine.profile import load_profile
from lowmem.models import model_builder
from lowmem.planning.plan import Plan, make_plan
from lowmem.recipe import recipe_from_dict

RECIPE = """
schema: 1
method: end_to_end
model: {name: vit, num_layers: 2, dim: 32, num_heads: 4, patch_size: 2, dropout: 0.1}
blocks: {num_blocks: 2, visit_steps: 4}
data: {name: digits}
train: {num_steps: 12, batch_size: 32, micro_batch_size: 8, lr: 2.0e-3, warmup_steps: 2}
optimizer: {name: adamw, grad_clip: 1.0, clip: global}
"""
LOSS, WEIGHT = 2e-5, 2e-4  # how far two orders of adding up may be apart after twelve steps


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "exact.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    trained(recipe, run, 1)
    return run


def losses(run: Path) -> dict[int, float]:
    """The loss of each step; of a step that was made again the last one."""
    records = map(json.loads, (run / "telemetry.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["event"] == "step"}


def tensors(run: Path) -> dict[str, Tensor]:
    state = RunDir(run).read_state()
    assert state is not None
    files = {key: load_file(run / record.name) for key, record in state.files.items()}
    return {f"{key} {name}": value.float() for key, file in files.items() for name, value in file.items()}


def assert_alike(one: Path, other: Path) -> None:
    assert losses(one).keys() == losses(other).keys() == set(range(12))
    assert all(abs(loss - losses(other)[step]) < LOSS for step, loss in losses(one).items())
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(float((value - theirs[name]).abs().max()) < WEIGHT for name, value in ours.items())


def exported_losses(run: Path, folder: Path) -> Tensor:
    """[B] of a batch, by a model that plain torch and safetensors load from what a run exports."""
    export_run(run, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    recipe = recipe_from_dict(json.loads((folder / "recipe.json").read_text()), "exported")
    model = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))()
    model.load_state_dict({name: files[file][name] for name, file in index["weight_map"].items()})
    model.eval()
    objective = model.make_objective(recipe.noise)
    drawn = load_data(recipe.data, recipe.train.seq_len).batch(0, 0, 32)
    batch = {name: torch.as_tensor(values) for name, values in drawn.items()}
    with torch.no_grad():
        return objective.end_to_end_loss(list(model.layers), batch, False)


@pytest.mark.parametrize(
    "stage", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_two_ranks_follow_the_single_process_loss_curve(
    recipe: Path, alone: Path, tmp_path: Path, stage: int
) -> None:
    trained(recipe, tmp_path / "run", 2, "--set", f"offload.zero_stage={stage}")
    assert_alike(tmp_path / "run", alone)
    ours, theirs = (
        exported_losses(run, tmp_path / name) for run, name in ((tmp_path / "run", "ours"), (alone, "theirs"))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_goes_on_alone_and_on_two_ranks_again(
    recipe: Path, alone: Path, tmp_path: Path, stage: int
) -> None:
    run, options = tmp_path / "run", ["--set", f"offload.zero_stage={stage}"]
    for size, visits in ((2, 1), (1, 2)):
        with ranks_of([command(recipe, run, *options)] * size) as started:
            wait_for_visits(run, visits)
            started[-1].kill()
            outcome(started[0])
    trained(recipe, run, 2, *options)
    assert_alike(run, alone)


# ------------------------------------------------------------------------------------------------------------
# What a plan becomes


def plan_with(profile: str = "cpu-4gib", **changes: Any) -> Plan:
    exact = {"method": "end_to_end", "optimizer__name": "adamw", "optimizer__grad_clip": None}
    recipe = recipe_with(**{**SHORT, **exact, **changes})
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    return make_plan(build, recipe, load_profile(profile))


@pytest.mark.parametrize(
    ("tier", "stage", "where"),
    [
        ("device", 1, None),
        ("host", 3, {"device": "cpu"}),
        ("disk", 3, {"device": "nvme", "nvme_path": "run"}),
    ],
)
def test_the_tier_of_a_plan_says_what_is_offloaded(
    tier: str, stage: int, where: dict[str, str] | None
) -> None:
    config = engine_config(plan_with("gtx-1650-4gb", offload__tier=tier), 2, 16, "run")
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"].get("offload_param") == where
    assert config["zero_optimization"].get("offload_optimizer") == where


def test_batches_precision_and_clipping_are_those_of_the_plan() -> None:
    changes = {"optimizer__grad_clip": 0.5, "optimizer__clip": "global", "train__precision": "bfloat16"}
    config = engine_config(plan_with(**changes), 2, 16, "run")
    assert config["train_batch_size"] == 64 and config["gradient_accumulation_steps"] == 2
    assert config["bf16"] == {"enabled": True} and config["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({}, 2, ""),
        ({}, 3, "ranks: found 3 for train.batch_size 64; allowed: a divisor of it"),
        ({"optimizer__name": "adamw8bit"}, 2, "found 'adamw8bit'; allowed: adamw"),
        ({"optimizer__grad_clip": 1.0}, 2, "found 'block'; allowed: global"),
        (
            {"train__precision": "float16", "optimizer__loss_scale": 2.0},
            2,
            "found float16; allowed: float32, bfloat16",
        ),
        ({"blocks__sweep_steps": 2}, 2, "allowed: no sweep_steps"),
        ({"train__weights": "bfloat16", "train__precision": "bfloat16"}, 2, "train.weights"),
    ],
)
def test_what_the_engine_does_not_train_is_said_in_one_line(
    changes: dict[str, Any], size: int, words: str
) -> None:
    plan = plan_with(**changes)
    said = engine_refusal(plan.recipe, plan, size)
    assert "\n" not in said and words in said and bool(said) == bool(words)
