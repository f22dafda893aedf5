"""The advice on a plan that does not fit offers each cure where it helps, and none that is set already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import recipe_with

from lowmem import job
from lowmem.data.datasets import describe_data
from lowmem.errors import BudgetError
from lowmem.finetuning import finetune_recipe
from lowmem.machine.profile import load_profile
from lowmem.models import model_builder
from lowmem.planning.advice import CURES, Cure, Shortage, advice_for
from lowmem.planning.footprint import Budget, Predicted
from lowmem.planning.plan import make_plan
from lowmem.planning.settings import Settings
from lowmem.units import GIB

WHOLE = {"method": "end_to_end"}
PARTS = ("weights", "gradients", "optimizer_state", "activations", "borders", "shared_part", "staging")


class Case(NamedTuple):
    """What makes a cure help, and what of it changes once the cure is taken."""

    largest: str
    recipe: dict[str, Any]
    settings: dict[str, Any]
    taken_recipe: dict[str, Any]
    taken_settings: dict[str, Any]
    gradients: int = 1  # bytes; the largest part has 100


# (key, value) as the advice says them
CASES: dict[tuple[str, str], Case] = {
    ("offload.tier", "auto"): Case(
        "weights",
        {**WHOLE, "offload__tier": "device"},
        {"tier": "device"},
        {"offload__tier": "auto"},
        {},
    ),
    ("method", "diffusion_blocks"): Case(
        "weights", WHOLE, {"tier": "disk"}, {"method": "diffusion_blocks"}, {}
    ),
    ("blocks.num_blocks", "6"): Case(
        "weights", {"blocks__num_blocks": 3}, {"num_blocks": 3}, {"blocks__num_blocks": 6}, {"num_blocks": 6}
    ),
    ("train.recompute", "true"): Case(
        "activations",
        {"train__recompute": False},
        {"recompute": False},
        {"train__recompute": True},
        {"recompute": True},
    ),
    ("train.micro_batch_size", "1"): Case(
        "activations",
        {"train__micro_batch_size": 2},
        {"micro_batch_size": 2},
        {"train__micro_batch_size": 1},
        {"micro_batch_size": 1},
    ),
    ("offload.borders", "disk"): Case(
        "borders",
        {**WHOLE, "offload__borders": "host"},
        {"tier": "disk", "borders": "host"},
        {"offload__borders": "disk"},
        {"borders": "disk"},
    ),
    ("offload.tier", "disk"): Case(
        "optimizer_state",
        {"offload__tier": "host"},
        {"tier": "host"},
        {"offload__tier": "disk"},
        {"tier": "disk"},
    ),
    ("optimizer.name", "adamw8bit"): Case(
        "optimizer_state",
        {"optimizer__name": "adamw"},
        {"optimizer": "adamw"},
        {"optimizer__name": "adamw8bit"},
        {"optimizer": "adamw8bit"},
    ),
    ("train.weights", "bfloat16"): Case(
        "staging",
        {"train__weights": "float32", "train__precision": "bfloat16"},
        {"weights": "float32", "precision": "bfloat16"},
        {"train__weights": "bfloat16"},
        {"weights": "bfloat16"},
    ),
    ("optimizer.grad_clip", "null"): Case(
        "weights",
        {"optimizer__grad_clip": 1.0},
        {},
        # with several micro-batches gradients gather all the same
        {"optimizer__grad_clip": None},
        {},
        gradients=25,
    ),
    ("offload.prefetch", "false"): Case(
        "staging", {"offload__prefetch": True}, {"tier": "disk"}, {"offload__prefetch": False}, {}
    ),
}


def shortage(largest: str, recipe: dict[str, Any], settings: dict[str, Any], gradients: int = 1) -> Shortage:
    """A plan whose largest part is the given one, on a device that has a single byte."""
    parts = {**dict.fromkeys(PARTS, 1), "gradients": gradients, largest: 100, "runtime_floor": 2}
    settled: dict[str, Any] = {
        "num_blocks": 3,
        "micro_batch_size": 2,
        "precision": "float32",
        "recompute": False,
        "optimizer": "adamw",
        "tier": "disk",
        "write_back": "wait",
    }
    return Shortage(
        recipe_with(**recipe),
        load_profile("rtx-3060-12gb"),
        Settings(**{**settled, **settings}),
        Budget(device_bytes=1, host_bytes=GIB, disk_bytes=None),
        Predicted(
            device_peak_bytes=sum(parts.values()),
            host_peak_bytes=1,
            disk_bytes=1,
            by_category=parts,
            host_by_category={"blocks": 1},
            block_peak_bytes=[1] * 6,
        ),
    )


def offered(short: Shortage) -> list[tuple[str, str]]:
    """(key, value) of the cures that the table offers."""
    return [
        (cure.key, cure.text(short).removeprefix(f"{cure.key}: ").partition(" (")[0])
        for cure in CURES
        if cure.helps(short)
    ]


def test_every_cure_of_the_table_has_its_case_here() -> None:
    def name(cure: Cure) -> tuple[str, str]:
        value = cure.value
        return cure.key, value if isinstance(value, str) else "a number"

    numbers = ("blocks.num_blocks", "train.micro_batch_size")
    cases = [(key, "a number" if key in numbers else value) for key, value in CASES]
    assert sorted(map(name, CURES)) == sorted(cases)


@pytest.mark.parametrize("cure", CASES, ids=": ".join)
def test_a_cure_is_offered_where_it_helps_and_not_once_it_is_set(cure: tuple[str, str]) -> None:
    case = CASES[cure]
    before = shortage(case.largest, case.recipe, case.settings, case.gradients)
    assert cure in offered(before)
    assert "{}: {}".format(*cure) in advice_for(before)
    taken = shortage(
        case.largest,
        {**case.recipe, **case.taken_recipe},
        {**case.settings, **case.taken_settings},
        case.gradients,
    )
    assert cure[0] not in [key for key, value in offered(taken) if value == cure[1]]
    if cure[0] in ("blocks.num_blocks", "train.micro_batch_size"):  # as many, and as few, as there can be
        assert cure[0] not in [key for key, _ in offered(taken)]


def test_a_cure_is_not_offered_for_what_it_does_not_make_smaller() -> None:
    short = shortage("shared_part", {}, {"tier": "disk", "num_blocks": 6})
    assert offered(short) == []
    assert advice_for(short).endswith("Try a profile with more memory.")
    assert ("blocks.num_blocks", "6") not in offered(shortage("runtime_floor", {}, {"tier": "disk"}))


def test_the_advice_names_the_pool_that_is_too_small_and_its_largest_part() -> None:
    on_device = shortage("optimizer_state", {}, {})
    assert "on the device" in advice_for(on_device)
    assert "Largest part: optimizer state 100 B" in advice_for(on_device)
    host_alone = Budget(device_bytes=GIB, host_bytes=1, disk_bytes=None)
    on_host = Shortage(
        on_device.recipe, on_device.profile, on_device.settings, host_alone, on_device.predicted
    )
    assert "on the host" in advice_for(on_host)
    assert "Largest part: blocks 1 B" in advice_for(on_host)
    disk_alone = Budget(device_bytes=GIB, host_bytes=GIB, disk_bytes=0)
    on_disk = Shortage(
        on_device.recipe, on_device.profile, on_device.settings, disk_alone, on_device.predicted
    )
    assert "the run folder needs 1 B of disk; 0 B are free after the reserve" in advice_for(on_disk)


def test_a_plan_that_does_not_clip_is_not_told_to_stop_clipping() -> None:
    recipe = recipe_with(
        method="end_to_end",
        model__dim=2048,
        train__batch_size=4,
        offload__tier="device",
        optimizer__grad_clip=None,
        optimizer__during_backward=False,
    )
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    with pytest.raises(BudgetError, match="optimizer.name: adamw8bit") as refused:
        make_plan(build, recipe, load_profile("cpu-3gib")).require_fit()
    assert "grad_clip" not in str(refused.value)


def test_a_decoder_from_a_folder_is_not_advised_to_train_in_blocks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "vocab_size": 512,
                "hidden_size": 4096,
                "intermediate_size": 8192,
                "num_hidden_layers": 2,
                "num_attention_heads": 32,
            }
        )
    )
    plan = job.plan_recipe(finetune_recipe(tmp_path, overrides=["train.seq_len=64"]), "cpu-3gib")
    with pytest.raises(BudgetError) as caught:
        plan.require_fit()
    assert "diffusion_blocks" not in str(caught.value)
    assert "num_blocks" not in str(caught.value)
