"""One recipe planned by each method, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from lowmem import methods as methods_module
from lowmem.cli import app
from lowmem.errors import ConfigError
from lowmem.methods import MethodPlan, methods_table, plan_methods, recommended
from lowmem.planning import plan as plan_module
from lowmem.planning.duration import Duration, Work
from lowmem.planning.passes import Pass, PassCounter
from lowmem.units import MIB

SWEEPS = ["sweeps of 4", "sweeps of 8", "sweeps of 4, Muon"]
CHANGES = ["model.num_layers=6", "data.name=digits", "train.num_steps=100"]


@pytest.fixture(scope="module", autouse=True)
def uncounted_activations() -> Iterator[None]:
    """To count them takes seconds for each plan, and all of these fit."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_count", "_count_streamed"):
            patch.setattr(PassCounter, name, lambda *_: Pass(1, Work(), Work()))
        patch.setattr(plan_module, "_evaluation_of", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def plans(uncounted_activations: None) -> list[MethodPlan]:
    """Of a model that streams: all its layers, but none of them, fit."""
    away = ["offload.tier=disk", "offload.resident_layers=0"]
    return plan_methods("digits-vit", "cpu-4gib", [*CHANGES, *away])


def test_every_method_is_planned_from_any_recipe_of_the_model(plans: list[MethodPlan]) -> None:
    names = [each.way.name for each in plans]
    assert names == ["exact", *SWEEPS, "block coordinate", "growth at 0.8", "blocks"]
    assert all(each.plan is not None and each.fits for each in plans)
    recipes = [each.plan.recipe for each in plans if each.plan is not None]
    assert [recipe.method for recipe in recipes] == [
        *["end_to_end"] * 4,
        "block_coordinate",
        "end_to_end",
        "diffusion_blocks",
    ]
    assert [recipe.blocks.sweep_steps for recipe in recipes] == [1, 4, 8, 4, 1, 1, 1]
    assert [recipe.optimizer.name for recipe in recipes].count("muon") == 1
    assert [recipe.train.num_steps for recipe in recipes] == [100, 100, 104, 100, 100, 100, 100], (
        "in whole sweeps"
    )


def test_what_moves_falls_with_the_steps_of_a_sweep_and_with_growth(plans: list[MethodPlan]) -> None:
    exact, four, eight, muon, turns, growth, blocks = (each.moved_bytes_per_step for each in plans)
    assert exact is not None and four is not None and eight is not None and growth is not None
    assert four < exact / 3.9 and eight < exact / 7.8 and 0 < growth < exact / 1.9
    assert muon is not None and muon < exact / 3, "its matrices are so small that pages are rounded up"
    assert turns is not None and turns < exact / 4, "weights alone, and one block a visit"
    assert blocks is None, "blocks move visit by visit"
    table = methods_table(plans)
    assert "a block a visit" in table and table.splitlines()[-1].startswith("recommended: ")


def waiting(plan: MethodPlan, share: float) -> MethodPlan:
    assert plan.plan is not None
    time = Duration(
        step_s=1.0,
        visit_s=1.0,
        run_s=1.0,
        samples_per_s=1.0,
        tokens_per_s=None,
        moving_s=share,
        exposed_s=share,
        disk_written_bytes=MIB,
    )
    predicted = plan.plan.predicted.model_copy(update={"time": time})
    return plan._replace(plan=plan.plan.model_copy(update={"predicted": predicted}))


def test_the_exact_step_is_recommended_until_it_waits_and_then_the_best_that_fits(
    plans: list[MethodPlan],
) -> None:
    hidden = recommended([waiting(plans[0], 0.05), *plans[1:]])
    assert hidden is not None and hidden[0].way.name == "exact"
    exposed = recommended([waiting(plans[0], 0.5), *plans[1:]])
    assert exposed is not None and exposed[0].way.name == "sweeps of 4, Muon"
    without = [each._replace(plan=None) if "Muon" in each.way.name else each for each in plans[1:]]
    grown = recommended([waiting(plans[0], 0.5), *without])
    assert grown is not None and grown[0].way.name == "growth at 0.8"
    none_fits = recommended([each._replace(plan=None) for each in plans])
    assert none_fits is None


def test_a_trained_model_is_swept_and_does_not_grow(
    plans: list[MethodPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plans[0].plan is not None
    monkeypatch.setattr(type(plans[0].plan.recipe.model), "begins_trained", True)
    exact = waiting(plans[0], 0.5)
    found = recommended([exact, *plans[1:]])
    assert found is not None and found[0].way.name == "sweeps of 4"
    growth_alone = recommended([exact, plans[5]])
    assert growth_alone is not None and growth_alone[0].way.name == "growth at 0.8"


def test_a_method_that_cannot_be_says_why_and_the_others_are_planned() -> None:
    found = plan_methods("digits-vit", "cpu-4gib", [*CHANGES, "optimizer.clip=global", "method=end_to_end"])
    problems = {each.way.name: each.problem for each in found if each.problem}
    assert set(problems) == {*SWEEPS, "block coordinate", "blocks"}
    assert "optimizer.clip" in problems["sweeps of 4"] and "\n" not in "".join(problems.values())


def test_the_command_prints_one_object_and_refuses_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods_module, "WAYS", methods_module.WAYS[:1])
    arguments = ["plan", "digits-vit", "--profile", "cpu-4gib", "--methods"]
    arguments += [part for change in CHANGES for part in ("--set", change)]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    methods = json.loads(done.stdout)["methods"]
    assert [each["method"] for each in methods][0] == "exact" and methods[0]["plan"]["fits"]
    with pytest.raises(ConfigError, match="--methods: found 2 profiles; allowed: one"):
        CliRunner().invoke(app, [*arguments, "--profile", "cpu-3gib"], catch_exceptions=False)
