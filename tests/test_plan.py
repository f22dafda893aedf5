"""The search for the largest micro-batch that fits, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import recipe_with

from lowmem.data import describe_data
from lowmem.footprint import ActivationCounter
from lowmem.hardware import Profile, load_profile, profile_from_dict
from lowmem.models import model_builder
from lowmem.models.recurrent_lm import RecurrentLm
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
