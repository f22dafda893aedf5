"""The search for the largest micro-batch that fits, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import recipe_with

from lowmem.data import describe_data
from lowmem.errors import BudgetError, ConfigError
from lowmem.footprint import ActivationCounter, layouts_of
from lowmem.hardware import Profile, load_profile, profile_from_dict
from lowmem.models import model_builder
from lowmem.models.recurrent_lm import RecurrentLm
from lowmem.models.vit import Vit
from lowmem.plan import Plan, make_plan


def machine(memory_gib: float) -> Profile:
    raw = load_profile("rtx-4060-laptop-8gb").model_dump(mode="json", by_alias=True)
    raw["device"].update(memory_gib=memory_gib, reserve_gib=0.01)
    return profile_from_dict(raw, "test")


def planned(memory_gib: float, **changes: Any) -> Plan:
    recipe = recipe_with(method="end_to_end", train__batch_size=1024, train__recompute=False, model__dim=128, offload__tier="device", **changes)
    return make_plan(model_builder(recipe, describe_data(recipe)), recipe, machine(memory_gib))


@pytest.mark.parametrize("memory_gib", [0.45, 0.5, 0.6, 0.8, 1.5])
def test_the_plan_takes_the_largest_micro_batch_that_fits_and_looks_at_few(memory_gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    count = ActivationCounter._count

    def counting(self: ActivationCounter, layers: range, settings: Any) -> int:
        counted.append(settings.micro_batch_size)
        return count(self, layers, settings)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationCounter, "_count", counting)
        found = planned(memory_gib)
    size = found.settings.micro_batch_size
    assert len(counted) <= 4, counted
    if found.fits:
        assert size == 1024 or not planned(memory_gib, train__micro_batch_size=2 * size).fits
    else:
        assert size == 1


def test_the_plan_of_a_loop_does_not_depend_on_a_drawn_number_of_iterations() -> None:
    model = {"name": "recurrent_lm", "num_layers": 3, "prelude_layers": 1, "coda_layers": 1, "dim": 32, "num_heads": 2, "backprop_iterations": 2}
    peaks = set()
    for seed in range(3):
        recipe = recipe_with(method="end_to_end", model={**model, "iterations": 3}, data={"name": "custom"}, blocks__num_blocks=1, train__seq_len=16)
        torch.manual_seed(seed)
        peaks.add(make_plan(lambda recipe=recipe: RecurrentLm(recipe.model, 11, 16), recipe, machine(4.0)).predicted.device_peak_bytes)
    assert len(peaks) == 1


def test_updates_during_backward_save_the_gradients_and_cost_what_is_counted() -> None:
    changes = {"blocks__num_blocks": 3, "model__dim": 256, "train__batch_size": 8, "train__precision": "bfloat16", "optimizer__name": "adamw"}
    recipe = recipe_with(**changes, optimizer__grad_clip=None)
    build = model_builder(recipe, describe_data(recipe))
    during, after = (
        make_plan(build, recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"during_backward": choice})}), machine(4.0))
        for choice in ("auto", False)
    )
    assert during.settings.during_backward and not after.settings.during_backward
    assert any(choice.startswith("optimizer.during_backward true") for choice in during.choices)
    with torch.device("meta"):
        layouts, shared = layouts_of(build(), during.settings)
    ours, theirs = during.predicted.by_category, after.predicted.by_category
    assert theirs["gradients"] == 2 * layouts[0].numel and ours["gradients"] == 0
    assert theirs["shared_part"] - ours["shared_part"] == 2 * shared.numel
    assert ours["activations"] <= theirs["activations"] + 4 * max(slot.numel for slot in layouts[0].slots), "one gradient widened"
    assert during.predicted.device_peak_bytes < after.predicted.device_peak_bytes


def test_weights_kept_in_bf16_take_two_bytes_each_and_no_copy() -> None:
    common = {"blocks__num_blocks": 3, "train__precision": "bfloat16", "train__micro_batch_size": 64, "optimizer__name": "adamw8bit"}
    plans = {}
    for weights in ("float32", "bfloat16"):
        recipe = recipe_with(**common, train__weights=weights)
        build = model_builder(recipe, describe_data(recipe))
        plans[weights] = make_plan(build, recipe, machine(4.0))
    with torch.device("meta"):
        (layouts, shared), (wide, _) = (layouts_of(build(), plans[weights].settings) for weights in ("bfloat16", "float32"))
    numel = sum(layout.numel for layout in layouts)
    narrow, masters = plans["bfloat16"].predicted, plans["float32"].predicted
    assert narrow.by_category["weights"] == 2 * numel  # all three on the device
    assert masters.by_category["weights"] == 4 * numel + 2 * layouts[0].numel
    assert wide[0].total_bytes - layouts[0].total_bytes == pytest.approx(2 * layouts[0].numel, abs=4096)
    assert narrow.by_category["shared_part"] == shared.total_bytes + 2 * shared.numel
    assert narrow.disk_bytes < masters.disk_bytes
    assert "weights bfloat16" in plans["bfloat16"].table()


def test_a_plan_that_does_not_fit_offers_bf16_weights_and_updates_during_backward() -> None:
    common = {"method": "end_to_end", "train__batch_size": 1, "train__precision": "bfloat16", "model__dim": 2048, "optimizer__name": "adamw8bit"}
    common["offload__tier"] = "device"
    recipe, taken = recipe_with(**common), recipe_with(**common, optimizer__grad_clip=None, train__weights="bfloat16")
    build = model_builder(recipe, describe_data(recipe))
    with pytest.raises(BudgetError, match=r"Largest part: weights .* train\.weights: bfloat16, or optimizer\.grad_clip: null"):
        make_plan(build, recipe, machine(3.5)).require_fit()
    assert make_plan(build, taken, machine(3.5)).fits


class UsesAWeightAgain(Vit):
    """Reads a layer's weight as a constant, below that layer: backward needs it after its gradient is whole."""

    def input_part(self, batch: Any, noisy: Any, c_noise: Any) -> Any:
        h, cond = super().input_part(batch, noisy, c_noise)
        return h * self.layers[-1].proj.weight.detach()[0], cond


def test_a_model_that_needs_a_weight_after_its_update_is_refused_by_the_plan() -> None:
    recipe = recipe_with(optimizer__grad_clip=None, blocks__num_blocks=1)
    with pytest.raises(ConfigError, match=r"set optimizer\.during_backward: false"):
        make_plan(lambda: UsesAWeightAgain(recipe.model, (1, 8, 8), 10), recipe, machine(4.0))
    recipe = recipe_with(optimizer__grad_clip=None, optimizer__during_backward=False, blocks__num_blocks=1)
    assert make_plan(lambda: UsesAWeightAgain(recipe.model, (1, 8, 8), 10), recipe, machine(4.0)).fits
