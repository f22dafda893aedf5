"""Candidates come best first and hold what the recipe fixes; settings that exclude each other are refused."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import recipe_with

from lowmem.errors import ConfigError
from lowmem.machine.profile import load_profile
from lowmem.planning.candidates import candidates_of, choices_of
from lowmem.planning.settings import Settings
from lowmem.recipe import NoiseConfig

OPEN = {"blocks__num_blocks": "auto", "train__batch_size": 6, "optimizer__name": "auto"}
FIXED: dict[str, Any] = {
    "blocks__num_blocks": 3,
    "train__micro_batch_size": 2,
    "train__batch_size": 6,
    "train__recompute": True,
    "train__precision": "float32",
    "optimizer__name": "adamw",
    "optimizer__during_backward": False,
    "offload__tier": "disk",
    "offload__borders": "disk",
}


def listed(machine: str, num_layers: int = 3, **changes: Any) -> list[list[Settings]]:
    recipe = recipe_with(**{**OPEN, **changes})
    return list(candidates_of(recipe, load_profile(machine), num_layers))


def places(machine: str, shared: str = "device", **changes: Any) -> list[tuple[int, str, bool, str]]:
    candidates = [sizes[0] for sizes in listed(machine, **changes)]
    return [(c.num_blocks, c.tier, c.recompute, c.borders) for c in candidates if c.shared == shared]


def test_blocks_in_turns_are_few_first_then_near_then_without_recompute() -> None:
    assert places("rtx-3060-12gb") == [
        (count, tier, recompute, "device")
        for count in (1, 2, 3)
        for tier in ("device", "host", "disk")
        for recompute in (False, True)
    ]


def test_a_model_trained_end_to_end_is_near_first_then_without_recompute_then_with_near_borders() -> None:
    away = [
        (count, tier, recompute, borders)
        for tier in ("host", "disk")
        for recompute in (False,)  # a layer that streams is made again from its border in any case
        for borders in ("device", "host", "disk")
        for count in (2, 3)
    ]
    together = [(1, "device", recompute, "device") for recompute in (False, True)]
    assert places("rtx-3060-12gb", method="end_to_end") == together + away
    assert places("rtx-3060-12gb", "tier", method="end_to_end") == away


def test_the_shared_parts_state_rests_with_the_blocks_only_after_every_border_was_tried_with_it_near() -> (
    None
):
    found = [(sizes[0].tier, sizes[0].shared) for sizes in listed("rtx-3060-12gb", method="end_to_end")]
    order = [
        ("device", "device"),
        *((tier, place) for tier in ("host", "disk") for place in ("device", "tier")),
    ]
    assert list(dict.fromkeys(found)) == order and found == sorted(found, key=order.index)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "diffusion_blocks"},
        {"method": "end_to_end", "offload__tier": "device"},
        {"method": "end_to_end", "blocks__sweep_steps": 2, "blocks__num_blocks": 3},
    ],
    ids=["blocks in turns", "resident", "sweeps"],
)
def test_the_shared_part_stays_where_nothing_streams_in_each_step(changes: dict[str, Any]) -> None:
    assert not places("rtx-3060-12gb", "tier", **changes)
    with pytest.raises(ConfigError, match=r"offload\.shared: found tier; allowed where all weights"):
        listed("rtx-3060-12gb", offload__shared="tier", **changes)


@pytest.mark.parametrize("machine", ["cpu-16gib", "jetson-orin-nano-8gb"])
@pytest.mark.parametrize("method", ["diffusion_blocks", "end_to_end"])
def test_one_memory_has_no_host_tier_beside_the_device(machine: str, method: str) -> None:
    found = places(machine, method=method)
    assert {tier for _, tier, _, _ in found} == {"device", "disk"}
    assert {borders for *_, borders in found} <= {"device", "disk"}


def test_micro_batches_divide_the_batch_largest_first_and_are_whole_for_updates_during_backward() -> None:
    assert {tuple(c.micro_batch_size for c in sizes) for sizes in listed("cpu-16gib")} == {(6, 3, 2, 1)}
    during = {"optimizer__during_backward": True, "optimizer__grad_clip": None}
    assert {tuple(c.micro_batch_size for c in sizes) for sizes in listed("cpu-16gib", **during)} == {(6,)}


def test_a_recipe_that_leaves_nothing_open_has_one_candidate_and_no_choice_to_explain() -> None:
    ((candidate,),) = listed("cpu-16gib", **FIXED)
    assert (candidate.num_blocks, candidate.tier, candidate.recompute) == (3, "disk", True)
    assert (candidate.micro_batch_size, candidate.precision, candidate.optimizer) == (2, "float32", "adamw")
    recipe = recipe_with(**FIXED)
    assert choices_of(recipe, load_profile("cpu-16gib"), candidate, NoiseConfig()) == []


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"blocks__num_blocks": "auto"}, "blocks.num_blocks 3: the fewest that fit"),
        ({"train__micro_batch_size": "auto"}, "train.micro_batch_size 2: the largest that fits, of batch 6"),
        ({"train__recompute": "auto"}, "train.recompute true: needed to fit"),
        ({"train__precision": "auto"}, "train.precision float32: the profile computes in float32"),
        ({"optimizer__name": "auto"}, "optimizer.name adamw: on a CPU 8-bit state costs much time"),
        ({"offload__tier": "auto"}, "offload.tier disk: the first that fits"),
        ({"noise__schedule": "balanced"}, "noise.schedule balanced: ln sigma ~ N(-0.50, 0.75), measured"),
    ],
)
def test_each_setting_left_open_has_its_line_alone(given: dict[str, Any], line: str) -> None:
    ((candidate,),) = listed("cpu-16gib", **FIXED)
    recipe = recipe_with(**{**FIXED, **given})
    noise = NoiseConfig(p_mean=-0.5, p_std=0.75)
    (found,) = choices_of(recipe, load_profile("cpu-16gib"), candidate, noise)
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks__num_blocks": 4}, "blocks.num_blocks: found 4; allowed: at most the model's 3 layers"),
        (
            {"method": "end_to_end", "blocks__num_blocks": 1, "offload__tier": "disk"},
            "offload.tier: found 'disk'; allowed with method end_to_end and blocks.num_blocks 1: device",
        ),
        (
            {
                "method": "end_to_end",
                "optimizer__during_backward": True,
                "optimizer__grad_clip": None,
                "offload__tier": "host",
            },
            "allowed with method end_to_end and optimizer.during_backward true: device, auto",
        ),
        (
            {"train__weights": "bfloat16"},
            "train.weights: found bfloat16; allowed where train.precision is auto and profile gtx-1650-4gb",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_refused_with_what_is_allowed(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        listed("gtx-1650-4gb", **changes)
    assert message in str(refused.value)


def test_an_apple_gpu_has_no_8_bit_state() -> None:
    with pytest.raises(ConfigError, match="found adamw8bit; allowed on device type mps .* adamw"):
        listed("apple-m2-16gb", optimizer__name="adamw8bit")
    ((candidate,),) = listed("apple-m2-16gb", **{**FIXED, "optimizer__name": "auto"})
    assert candidate.optimizer == "adamw"
    recipe = recipe_with(**{**FIXED, "optimizer__name": "auto"})
    lines = choices_of(recipe, load_profile("apple-m2-16gb"), candidate, NoiseConfig())
    assert "optimizer.name adamw: there is no 8-bit kernel for device type mps" in lines
