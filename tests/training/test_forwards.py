"""How often a streamed step computes each layer: on the way there, and again on the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exact_runs import batches, setting, short
from exact_runs import uncounted_activations as uncounted_activations
from torch import nn

from lowmem.machine.profile import load_profile
from lowmem.models.base import BlockModel, BuildModel
from lowmem.planning.plan import make_plan
from lowmem.recipe import Recipe
from lowmem.training.trainer import Trainer

STEPS, PARTS = 2, 2


def forwards(folder: Path, recipe: Recipe, build: BuildModel, num_blocks: int | None = None) -> list[int]:
    """Calls of each layer, for one micro-batch of one step. `num_blocks`: in place of the plan's."""
    calls: Counter[int] = Counter()

    def counted() -> BlockModel:
        model = build()
        for index, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(counter(index))  # also a forward that is cut short
        return model

    def counter(index: int) -> Callable[..., None]:
        def count(layer: nn.Module, *_: Any) -> None:
            calls[index] += 1

        return count

    plan = make_plan(counted, recipe, load_profile("cpu-4gib"))
    assert plan.settings.tier == "disk" and plan.settings.recompute == recipe.train.recompute
    if num_blocks is not None:
        settings = plan.settings.model_copy(update={"num_blocks": num_blocks})
        plan = plan.model_copy(update={"settings": settings})
    trainer = Trainer(counted, plan, folder)
    calls.clear()  # a plan counts what a pass would take
    trainer.fit(batches)
    layers = range(len(build().layers))
    assert all(calls[layer] % (STEPS * PARTS) == 0 for layer in layers)
    return [calls[layer] // (STEPS * PARTS) for layer in layers]


def streamed(name: str, recompute: bool, **overrides: Any) -> tuple[Recipe, BuildModel]:
    train = {**short(STEPS), "recompute": recompute}
    return setting(name, offload__tier="disk", train=train, **overrides)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("num_blocks", range(1, 6))
def test_each_layer_computes_twice_and_the_last_once_however_many_blocks(
    tmp_path: Path, num_blocks: int, recompute: bool
) -> None:
    """The last layer's backward follows at once, so what its forward keeps is used."""
    found = forwards(tmp_path, *streamed("causal_lm", recompute), num_blocks)
    assert found == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("recompute", [True, False])
def test_the_whole_models_norm_costs_one_more_pass(tmp_path: Path, recompute: bool) -> None:
    changes = {"optimizer__clip": "global", "optimizer__grad_clip": 0.01}
    assert forwards(tmp_path, *streamed("vit", recompute, **changes)) == [3, 3, 3, 3, 2]
