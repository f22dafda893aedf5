"""Noise schedules that fit discrete targets: measured, and equal to what a drawn table shows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import recipe_with
from pydantic import ValidationError

from lowmem.data.datasets import describe_data
from lowmem.errors import ConfigError
from lowmem.machine.profile import load_profile
from lowmem.models import model_builder
from lowmem.noise import Interval, boundaries, drawn_levels, settled_noise
from lowmem.planning.plan import make_plan
from lowmem.recipe import STANDARD_NORMAL, NoiseConfig


def open_share(num_rows: int, dim: int, sigma: float) -> float:
    """H(y | z) / ln K over a real random table, by drawing z."""
    torch.manual_seed(0)
    table = F.normalize(torch.randn(num_rows, dim), dim=-1)
    y = torch.randint(num_rows, (4000,))
    z = table[y] + sigma * torch.randn(4000, dim)
    log_probs = (z @ table.T / sigma**2).log_softmax(-1)
    return float(-(log_probs.exp() * log_probs).sum(-1).mean()) / math.log(num_rows)


@pytest.mark.parametrize(("num_rows", "dim"), [(10, 64), (256, 96)])
def test_a_balanced_schedule_has_its_quartiles_where_a_drawn_table_loses_its_quarters(
    num_rows: int, dim: int
) -> None:
    noise = settled_noise(NoiseConfig(schedule="balanced"), (num_rows, dim))
    assert open_share(num_rows, dim, math.exp(noise.p_mean)) == pytest.approx(0.5, abs=0.05)
    quartile = noise.p_std * STANDARD_NORMAL.inv_cdf(0.75)
    assert open_share(num_rows, dim, math.exp(noise.p_mean - quartile)) == pytest.approx(0.25, abs=0.1)
    assert open_share(num_rows, dim, math.exp(noise.p_mean + quartile)) == pytest.approx(0.75, abs=0.1)


def test_a_centred_schedule_has_that_middle_and_the_recipes_spread() -> None:
    centred, balanced = (
        settled_noise(NoiseConfig(schedule=schedule), (10, 64)) for schedule in ("centred", "balanced")
    )
    assert centred.p_mean == balanced.p_mean and centred.p_std == 1.2 != balanced.p_std


def test_more_targets_need_less_noise_to_be_told_apart() -> None:
    means = [settled_noise(NoiseConfig(schedule="balanced"), (rows, 128)).p_mean for rows in (10, 100, 1000)]
    assert means == sorted(means, reverse=True)


def test_the_plan_settles_the_schedule_says_so_and_keeps_the_recipe() -> None:
    recipe = recipe_with(noise={"schedule": "balanced"})
    plan = make_plan(
        model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len)),
        recipe,
        load_profile("cpu-4gib"),
    )
    assert plan.recipe.noise.schedule == "balanced" and plan.noise == settled_noise(recipe.noise, (10, 64))
    assert any("noise.schedule balanced" in choice for choice in plan.choices)
    assert boundaries(3, plan.noise)[1:3] != boundaries(3, NoiseConfig())[1:3]


def test_a_schedule_that_measures_a_table_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="allowed for targets that are no rows of a table: lognormal"):
        settled_noise(NoiseConfig(schedule="balanced"), None)


@pytest.mark.parametrize(
    "given",
    [
        {"schedule": "balanced", "p_mean": 0.0},
        {"schedule": "balanced", "p_std": 1.0},
        {"schedule": "centred", "p_mean": 0.0},
    ],
)
def test_what_a_schedule_measures_cannot_be_given(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="leave it out"):
        NoiseConfig(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_draws_at_sigma_max_is_the_share_named(share: float) -> None:
    torch.manual_seed(0)
    levels = drawn_levels(
        (20_000,), torch.device("cpu"), Interval(0.1, 0.5), NoiseConfig(sigma_max_share=share)
    )
    at_top = levels == 80.0
    assert float(at_top.float().mean()) == pytest.approx(share, abs=0.01)
    assert ((levels[~at_top] >= 0.1) & (levels[~at_top] <= 0.5)).all()
