"""The average of the weights: kept beside them, the same at every tier, and what a run is read through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recipe_with
from safetensors.torch import load_file

from lowmem.blocks import optim
from lowmem.blocks.arena import Arena, ArenaLayout, aligned_buffer
from lowmem.blocks.run_dir import RunDir, RunState
from lowmem.data.datasets import describe_data, load_data
from lowmem.inference.frozen_run import FrozenRun
from lowmem.machine.profile import load_profile
from lowmem.models import model_builder
from lowmem.models.base import BuildModel
from lowmem.planning.plan import Plan, make_plan
from lowmem.planning.settings import layouts_of
from lowmem.recipe import OptimizerConfig, Recipe
from lowmem.reporting.report import digest
from lowmem.training.first_weights import create_weights
from lowmem.training.trainer import Trainer

SHORT = {
    "model__num_layers": 3,
    "model__dim": 32,
    "train__num_steps": 4,
    "train__warmup_steps": 0,
    "blocks__visit_steps": 2,
}


def planned(**overrides: Any) -> tuple[Recipe, BuildModel, Plan]:
    recipe = recipe_with(**{**SHORT, **overrides})
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    return recipe, build, make_plan(build, recipe, load_profile("cpu-4gib"))


def run_short(folder: Path, **overrides: Any) -> RunState:
    recipe, build, plan = planned(**overrides)
    data = load_data(recipe.data, recipe.train.seq_len)
    return Trainer(build, plan, folder).fit(lambda step: data.batch(0, step, recipe.train.batch_size))


def test_every_tier_gives_the_same_digest(tmp_path: Path) -> None:
    assert (
        len(
            {
                digest(run_short(tmp_path / tier, offload__tier=tier, optimizer__ema=0.9))
                for tier in ("device", "host", "disk")
            }
        )
        == 1
    )


def test_an_average_changes_no_weight_and_costs_four_bytes_each(tmp_path: Path) -> None:
    plain, averaged = (
        load_block(tmp_path / name, run_short(tmp_path / name, optimizer__ema=ema))
        for name, ema in (("plain", None), ("ema", 0.9))
    )
    assert set(averaged) - set(plain) == {"optimizer.ema"}
    assert all(
        torch.equal(averaged[name], value) for name, value in plain.items() if not name.startswith("padding")
    )
    for optimizer in ("adamw", "adamw8bit"):
        without, with_ema = (
            ArenaLayout([("w", (64, 64)), ("b", (7,))], optimizer, ema) for ema in (False, True)
        )
        assert with_ema.total_bytes - without.total_bytes == pytest.approx(4 * without.numel, abs=4096)
        assert with_ema.numel == without.numel and with_ema.fields["ema"][0].numel == without.numel


def load_block(folder: Path, state: RunState) -> dict[str, torch.Tensor]:
    return load_file(folder / state.files["block-1"].name)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_the_average_is_that_of_a_plain_loop(optimizer: str) -> None:
    layout = ArenaLayout([("w", (70, 61)), ("b", (9,))], optimizer, ema=True)
    arena = Arena(layout, aligned_buffer(layout.total_bytes))
    arena.weights.normal_()
    arena.state["ema"].copy_(arena.weights)
    config = OptimizerConfig(ema=0.5, grad_clip=None)
    average = arena.weights.clone().double()
    for step in range(1, 20):
        optim.update(arena, torch.randn(layout.numel) * 0.01, optim.Step(step, 1e-2, config))
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * arena.weights.double()
    assert (arena.state["ema"].double() - average).abs().max() < 1e-5
    assert not torch.equal(arena.state["ema"], arena.weights)


def test_a_run_is_read_through_its_average(tmp_path: Path) -> None:
    state = run_short(tmp_path, optimizer__ema=0.9)
    saved = {
        name: value
        for file in state.files.values()
        for name, value in load_file(tmp_path / file.name).items()
        if name[:9] != "optimizer"
    }
    _, build, plan = planned(optimizer__ema=0.9)
    assert plan.settings.ema
    with FrozenRun(RunDir(tmp_path), plan, build) as frozen:
        layouts, shared = layouts_of(frozen.model, frozen.plan.settings)
        for key, layout in (("block-0", layouts[0]), ("shared", shared)):
            average = load_file(tmp_path / state.files[key].name)["optimizer.ema"]
            with frozen.on_device([0]):
                bound = dict(frozen.model.named_parameters())
                for slot in layout.slots:
                    assert torch.equal(
                        bound[slot.name].flatten(), average[slot.start : slot.start + slot.numel]
                    )
            assert any(
                not torch.equal(saved[slot.name].flatten(), average[slot.start : slot.start + slot.numel])
                for slot in layout.slots
            )


def test_the_first_average_is_the_first_weights(tmp_path: Path) -> None:
    _, build, plan = planned(optimizer__ema=0.9)
    run = RunDir(tmp_path / "run")
    with torch.device("meta"):
        model = build()
    run.acquire()
    try:
        file = load_file(run.path / create_weights(run, plan, model)["block-0"].name)
    finally:
        run.release()
    slot = layouts_of(model, plan.settings)[0][0].slots[-1]
    assert torch.equal(file["optimizer.ema"][slot.start : slot.start + slot.numel], file[slot.name].flatten())
    assert any(bool(value.any()) for name, value in file.items() if name.startswith("layers"))
