"""A number that stops being finite is seen in its step, before the commit, and said with what was unusual."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHORT, recipe_with

from lowmem.blocks.run_dir import RunDir
from lowmem.data.datasets import describe_data, load_data
from lowmem.errors import TrainingError
from lowmem.machine.profile import load_profile
from lowmem.models import model_builder
from lowmem.objectives.labels import LabelDenoising
from lowmem.planning.plan import make_plan
from lowmem.reporting.report import read_status
from lowmem.training.finite import FiniteWatch, not_finite
from lowmem.training.trainer import Trainer


def failed(folder: Path, spoil: Any, **overrides: Any) -> str:
    """The message of a short run whose batches `spoil(step, batch)` changes."""
    recipe = recipe_with(**{**SHORT, **overrides})
    build = model_builder(recipe, describe_data(recipe.data, None))
    plan, data = make_plan(build, recipe, load_profile("cpu-4gib"), folder), load_data(recipe.data, None)
    with pytest.raises(TrainingError) as caught:
        Trainer(build, plan, folder).fit(lambda step: spoil(step, data.batch(0, step, 64)))
    return str(caught.value)


def with_nan(step: int, batch: dict[str, Any]) -> dict[str, Any]:
    image = batch["image"].copy()
    image[0, 0, 0, 0] = np.nan if step == 3 else 0.0
    return {**batch, "image": image}


@pytest.mark.parametrize("method", ["diffusion_blocks", "end_to_end"])
@pytest.mark.parametrize("clip", [1.0, None])
def test_the_step_and_the_data_are_named_and_nothing_of_the_visit_is_committed(
    tmp_path: Path, method: str, clip: float | None
) -> None:
    tier = "disk" if method == "end_to_end" else "auto"
    message = failed(
        tmp_path, with_nan, method=method, optimizer__grad_clip=clip, offload__tier=tier, blocks__num_blocks=3
    )
    assert "step 3" in message and "'image', have 1 values that are not finite" in message
    state = RunDir(tmp_path).read_state()
    assert state is not None and state.visits_done == (3 if method == "diffusion_blocks" else 1)
    status = read_status(tmp_path)
    assert status["state"] == "stopped" and status["failure"] == message
    assert all("NaN" not in line for line in (tmp_path / "telemetry.jsonl").read_text().splitlines())
    json.loads((tmp_path / "state.json").read_text(), parse_constant=pytest.fail)


def test_weights_that_an_update_spoils_in_a_visits_last_step_are_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem.blocks import optim

    update, calls = optim.update, []

    def spoilt(arena: Any, *rest: Any) -> torch.Tensor:
        norm = update(arena, *rest)
        calls.append(arena)
        if len(calls) == 4:  # two steps of a visit, of a block and of the shared part
            arena.weights[0] = float("inf")
        return norm

    monkeypatch.setattr(optim, "update", spoilt)
    assert "step 1" in failed(tmp_path, lambda step, batch: batch)
    state = RunDir(tmp_path).read_state()
    assert state is not None and state.visits_done == 0


@pytest.mark.parametrize("tier", ["device", "disk"])
@pytest.mark.parametrize("clip", ["block", "global"])
def test_a_loss_that_overflows_while_every_gradient_and_weight_is_finite_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: str, clip: str
) -> None:
    """A constant has no gradient, so blocks and shared part show nothing; only the sum of the losses does."""
    leave, steps = LabelDenoising.leave, [0]

    def with_huge_constant(self: Any, *arguments: Any) -> torch.Tensor:
        losses: torch.Tensor = leave(self, *arguments)
        return losses + (3e38 if steps[-1] == 3 else 0.0)

    def spoil(step: int, batch: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return batch

    monkeypatch.setattr(LabelDenoising, "leave", with_huge_constant)
    keys = {"offload__tier": tier, "optimizer__clip": clip, "blocks__num_blocks": 3}
    message = failed(tmp_path, spoil, method="end_to_end", **keys)
    assert "step 3: a loss, gradient or weight is no longer a finite number" in message
    state = RunDir(tmp_path).read_state()
    assert state is not None and state.visits_done == 1


def test_the_watch_remembers_the_first_step() -> None:
    watch = FiniteWatch(torch.device("cpu"))
    watch.look(1, torch.tensor(1.0), torch.tensor(2.0))
    assert watch.first_step() is None
    watch.look(2, torch.tensor(1.0), torch.tensor(float("inf")))
    watch.look(3, torch.tensor(float("nan")))
    assert watch.first_step() == 2


def test_what_is_unusual_is_said_and_the_learning_rate_is_blamed_only_where_nothing_else_is() -> None:
    from lowmem.blocks.order import Visit

    visit = Visit(3, (1,), 50, 25)
    odd = recipe_with(optimizer__eps=1e-30, optimizer__betas=[0.0, 0.0])
    message = str(not_finite(odd, visit, 57, None, {}))
    assert "visit 3, block 1, step 57" in message and "lower train.lr" not in message
    assert "optimizer.eps 1e-30" in message and "optimizer.betas [0.0, 0.0]" in message
    assert "lower train.lr (now 0.002)" in str(not_finite(recipe_with(), visit, 57, None, {}))
