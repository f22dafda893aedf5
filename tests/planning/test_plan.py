"""The search for the largest micro-batch that fits, and what it costs."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import recipe_with

from lowmem.blocks.order import BlockQueue
from lowmem.blocks.unit import CHUNK_NUMEL
from lowmem.blocks.unit_stream import CHUNKS
from lowmem.cli.training import plan as cli_plan
from lowmem.data.datasets import describe_data
from lowmem.errors import BudgetError, ConfigError, ResumeError
from lowmem.job import largest_models, plan_recipe
from lowmem.machine.profile import Profile, load_profile, profile_from_dict
from lowmem.models import model_builder
from lowmem.models.recurrent_lm import RecurrentLm
from lowmem.models.vit import Vit
from lowmem.planning import footprint
from lowmem.planning import plan as plan_module
from lowmem.planning.candidates import candidates_of
from lowmem.planning.footprint import with_headroom
from lowmem.planning.passes import PassCounter
from lowmem.planning.plan import Plan, check_continues, make_plan
from lowmem.planning.settings import layouts_of, setup_of
from lowmem.units import GIB, MIB, PAGE


def machine(memory_gib: float) -> Profile:
    raw = load_profile("rtx-4060-laptop-8gb").model_dump(mode="json", by_alias=True)
    raw["device"].update(memory_gib=memory_gib, reserve_gib=0.01)
    return profile_from_dict(raw, "test")


def planned(memory_gib: float, **changes: Any) -> Plan:
    recipe = recipe_with(
        method="end_to_end",
        train__batch_size=1024,
        train__recompute=False,
        model__dim=128,
        offload__tier="device",
        **changes,
    )
    return make_plan(
        model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len)), recipe, machine(memory_gib)
    )


@pytest.mark.parametrize("memory_gib", [0.45, 0.5, 0.6, 0.8, 1.5])
def test_the_plan_takes_the_largest_micro_batch_that_fits_and_looks_at_few(
    memory_gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    count = PassCounter._count

    def counting(self: PassCounter, layers: range, settings: Any) -> int:
        counted.append(settings.micro_batch_size)
        return count(self, layers, settings)

    with monkeypatch.context() as patch:
        patch.setattr(PassCounter, "_count", counting)
        found = planned(memory_gib)
    size = found.settings.micro_batch_size
    assert len(counted) <= 4, counted
    if found.fits:
        assert size == 1024 or not planned(memory_gib, train__micro_batch_size=2 * size).fits
    else:
        assert size == 1


def test_the_floor_holds_what_was_measured_of_each_library_that_the_run_imports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def floor(kind: str, optimizer: str, stays: bool) -> int:
        monkeypatch.setattr(footprint, "compiler_stays", lambda: stays)
        recipe = recipe_with(offload__tier="device", optimizer__name=optimizer)
        build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
        found = make_plan(build, recipe, load_profile(kind)).predicted
        assert sum(found.by_category.values()) == found.device_peak_bytes
        return found.by_category["runtime_floor"]

    measured = {"bitsandbytes": 7 * MIB, "compiler": 50 * MIB}
    monkeypatch.setattr(footprint, "measured_library_bytes", lambda name: measured[name])
    base = floor("cpu-4gib", "adamw", False)
    assert floor("cpu-4gib", "adamw8bit", False) == base + 7 * MIB
    assert floor("cpu-4gib", "adamw8bit", True) == base + 57 * MIB
    card = floor("rtx-4060-laptop-8gb", "adamw", False)  # whose libraries are on the host
    assert floor("rtx-4060-laptop-8gb", "adamw8bit", True) == card


def test_the_plan_of_a_loop_does_not_depend_on_a_drawn_number_of_iterations() -> None:
    model = {
        "name": "recurrent_lm",
        "num_layers": 3,
        "prelude_layers": 1,
        "coda_layers": 1,
        "dim": 32,
        "num_heads": 2,
        "backprop_iterations": 2,
    }
    peaks = set()
    for seed in range(3):
        recipe = recipe_with(
            method="end_to_end",
            model={**model, "iterations": 3},
            data={"name": "custom"},
            blocks__num_blocks=1,
            train__seq_len=16,
        )
        torch.manual_seed(seed)
        peaks.add(
            make_plan(
                lambda recipe=recipe: RecurrentLm(recipe.model, 11, 16), recipe, machine(4.0)
            ).predicted.device_peak_bytes
        )
    assert len(peaks) == 1


def test_updates_during_backward_save_the_gradients_and_cost_what_is_counted() -> None:
    changes = {
        "blocks__num_blocks": 3,
        "model__dim": 256,
        "train__batch_size": 8,
        "train__precision": "bfloat16",
        "optimizer__name": "adamw",
    }
    recipe = recipe_with(**changes, optimizer__grad_clip=None)
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    during, after = (
        make_plan(
            build,
            recipe.model_copy(
                update={"optimizer": recipe.optimizer.model_copy(update={"during_backward": choice})}
            ),
            machine(4.0),
        )
        for choice in ("auto", False)
    )
    assert during.settings.during_backward and not after.settings.during_backward
    assert any(choice.startswith("optimizer.during_backward true") for choice in during.choices)
    with torch.device("meta"):
        layouts, shared = layouts_of(build(), during.settings)
    ours, theirs = during.predicted.by_category, after.predicted.by_category
    assert theirs["gradients"] == 2 * layouts[0].numel and ours["gradients"] == 0
    assert theirs["shared_part"] - ours["shared_part"] == 2 * shared.numel
    assert ours["activations"] <= theirs["activations"] + 4 * max(slot.numel for slot in layouts[0].slots), (
        "one gradient widened"
    )
    assert during.predicted.device_peak_bytes < after.predicted.device_peak_bytes


def test_weights_kept_in_bf16_take_two_bytes_each_and_no_copy() -> None:
    common = {
        "blocks__num_blocks": 3,
        "train__precision": "bfloat16",
        "train__micro_batch_size": 64,
        "optimizer__name": "adamw8bit",
    }
    plans = {}
    for weights in ("float32", "bfloat16"):
        recipe = recipe_with(**common, train__weights=weights)
        build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
        plans[weights] = make_plan(build, recipe, machine(4.0))
    with torch.device("meta"):
        (layouts, shared), (wide, _) = (
            layouts_of(build(), plans[weights].settings) for weights in ("bfloat16", "float32")
        )
    numel = sum(layout.numel for layout in layouts)
    narrow, masters = plans["bfloat16"].predicted, plans["float32"].predicted
    assert narrow.by_category["weights"] == 2 * numel  # all three on the device
    assert masters.by_category["weights"] == 4 * numel + 2 * layouts[0].numel
    assert wide[0].total_bytes - layouts[0].total_bytes == pytest.approx(2 * layouts[0].numel, abs=4096)
    assert narrow.by_category["shared_part"] == shared.total_bytes + 2 * shared.numel
    assert narrow.disk_bytes < masters.disk_bytes
    assert "weights bfloat16" in plans["bfloat16"].table()


def test_a_plan_that_does_not_fit_offers_bf16_weights_and_updates_during_backward() -> None:
    common = {
        "method": "end_to_end",
        "train__batch_size": 1,
        "train__precision": "bfloat16",
        "model__dim": 2048,
        "optimizer__name": "adamw8bit",
    }
    common["offload__tier"] = "device"
    recipe, taken = (
        recipe_with(**common),
        recipe_with(**common, optimizer__grad_clip=None, train__weights="bfloat16"),
    )
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    with pytest.raises(
        BudgetError, match=r"Largest part: weights .* train\.weights: bfloat16, or optimizer\.grad_clip: null"
    ):
        make_plan(build, recipe, machine(3.5)).require_fit()
    assert make_plan(build, taken, machine(3.5)).fits


class UsesAWeightAgain(Vit):
    """Reads the last layer's weight below all layers: backward needs it after its gradient is whole."""

    def input_part(self, batch: Any, noisy: Any, c_noise: Any) -> Any:
        h, cond = super().input_part(batch, noisy, c_noise)
        return h * self.layers[-1].proj.weight.detach()[0], cond


def test_a_model_that_needs_a_weight_after_its_update_is_refused_by_the_plan() -> None:
    recipe = recipe_with(optimizer__grad_clip=None, blocks__num_blocks=1)
    with pytest.raises(ConfigError, match=r"set optimizer\.during_backward: false"):
        make_plan(lambda: UsesAWeightAgain(recipe.model, (1, 8, 8), 10), recipe, machine(4.0))
    recipe = recipe_with(optimizer__grad_clip=None, optimizer__during_backward=False, blocks__num_blocks=1)
    assert make_plan(lambda: UsesAWeightAgain(recipe.model, (1, 8, 8), 10), recipe, machine(4.0)).fits


def test_a_budget_must_hold_the_making_of_the_plan_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small run takes less than the child that plans it, which such a limit kills."""
    recipe = recipe_with()
    monkeypatch.setattr(footprint, "compiler_stays", lambda: False)
    raw = load_profile("cpu-4gib").model_dump(mode="json", by_alias=True)

    def planned_in(num_bytes: int) -> Plan:
        memory = {"memory_gib": num_bytes / 2**30, "reserve_gib": 0.0}
        profile = profile_from_dict({**raw, "device": {**raw["device"], **memory}, "host": memory}, "test")
        data = describe_data(recipe.data, recipe.train.seq_len)
        return make_plan(model_builder(recipe, data), recipe, profile)

    predicted = planned_in(1 << 32).predicted
    needed = predicted.planning_bytes
    assert with_headroom(predicted.run_peak_bytes) < needed == predicted.device_needed_bytes
    assert planned_in(needed).fits
    tight = planned_in(needed - 1)
    with pytest.raises(BudgetError, match="making the plan takes .* device.memory_gib"):
        tight.require_fit()
    monkeypatch.setattr(footprint, "compiler_stays", lambda: True)  # then what trains holds the same
    assert planned_in(1 << 32).predicted.planning_bytes == 0


def test_a_plan_fits_only_with_room_for_what_its_prediction_may_be_off_by() -> None:
    recipe = recipe_with()
    plan = make_plan(
        model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len)),
        recipe,
        load_profile("cpu-4gib"),
    )
    needed = plan.predicted.device_needed_bytes
    assert needed - plan.predicted.run_peak_bytes == 32 * MIB
    assert with_headroom(100 * 1024 * MIB) == 102 * 1024 * MIB
    for allowed, fits in ((needed, True), (needed - 1, False)):
        assert (
            plan.model_copy(
                update={
                    "budget": plan.budget.model_copy(update={"device_bytes": allowed, "host_bytes": allowed})
                }
            ).fits
            is fits
        )


def test_a_plans_queue_has_the_recipes_method_steps_order_and_seed_and_the_settled_blocks() -> None:
    recipe = recipe_with(
        blocks__num_blocks=3,
        blocks__visit_steps=7,
        blocks__order="random",
        train__num_steps=31,
        train__seed=5,
    )
    queue = BlockQueue("diffusion_blocks", 3, 31, 7, "random", 5)
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    plan = make_plan(build, recipe, load_profile("cpu-4gib"))
    frozen = json.loads(json.dumps(plan.to_dict()))
    assert plan.queue() == queue
    assert BlockQueue.of(frozen["recipe"], frozen["settings"]["num_blocks"]) == queue


def test_a_run_goes_on_with_what_it_was_made_with_and_is_refused_at_the_first_difference() -> None:
    frozen = {"recipe": recipe_with(train__seed=1).to_dict(), "profile": {"name": "a"}}
    check_continues(Path("runs/x"), frozen, copy.deepcopy(frozen))
    given = copy.deepcopy(frozen)
    given["recipe"]["train"]["seed"] = 2
    given["profile"]["name"] = "b"
    with pytest.raises(ResumeError) as refused:
        check_continues(Path("runs/x"), frozen, given)
    assert str(refused.value) == (
        "run folder runs/x: made with recipe.train.seed = 1, now 2; use the same value, or another --run-dir"
    )


def test_a_run_may_go_on_with_another_answer_to_memory_that_runs_out() -> None:
    frozen, given = ({"recipe": recipe_with(train__on_oom=answer).to_dict()} for answer in ("stop", "shrink"))
    assert frozen != given
    check_continues(Path("runs/x"), frozen, given)


# ------------------------------------------------------------------------------------------------------------
# Time, several machines, the largest model


def test_the_operations_of_a_pass_are_six_for_each_weight_and_token_and_eight_with_recompute() -> None:
    recipe = recipe_with(method="end_to_end", model__dim=256, train__batch_size=8, train__micro_batch_size=8)
    with torch.device("meta"):
        model = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))()
    counter = PassCounter(model, model.make_objective(recipe.noise), recipe)
    settings = make_plan(lambda: model, recipe, load_profile("cpu-16gib")).settings
    products = sum(
        p.numel() for name, p in model.layers.named_parameters() if p.ndim == 2 and "modulation" not in name
    )  # that is once a sample
    tokens = 8 * 17  # 16 patches and the noisy label
    plain, recomputed = (
        sum(
            operations * count
            for (operations, _), count in counter(
                range(6), settings.model_copy(update={"recompute": on})
            ).work.items()
        )
        for on in (False, True)
    )
    assert plain == pytest.approx(6 * products * tokens, rel=0.15)
    assert recomputed == pytest.approx(8 / 6 * plain, rel=0.05)


def duration_of(profile: str, **changes: Any) -> Any:
    recipe = recipe_with(
        model__dim=256,
        blocks__num_blocks=3,
        offload__tier="disk",
        optimizer__name="adamw",
        **{"offload__write_back": "beside", **changes},
    )
    return make_plan(
        model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len)), recipe, load_profile(profile)
    ).predicted.time


def test_a_slow_disk_is_exposed_until_a_visit_has_steps_enough() -> None:
    short, long = (
        duration_of("cpu-4gib", blocks__visit_steps=steps, train__num_steps=300, train__batch_size=4)
        for steps in (1, 100)
    )
    assert short.exposed_s > 0 and long.exposed_s == 0
    assert short.moving_s == pytest.approx(long.moving_s)
    assert short.step_s == pytest.approx(long.step_s)
    assert short.run_s == pytest.approx(900 * (short.step_s + short.exposed_s))
    assert long.run_s == pytest.approx(900 * long.step_s)
    assert short.disk_written_bytes == pytest.approx(100 * long.disk_written_bytes)
    assert long.samples_per_s == pytest.approx(4 / long.step_s)
    waiting = duration_of(
        "cpu-4gib",
        blocks__visit_steps=100,
        train__num_steps=300,
        train__batch_size=4,
        offload__write_back="wait",
    )
    assert 0 < waiting.exposed_s < waiting.moving_s, (
        "the block is fetched beside compute, and written before the next step"
    )


def test_a_profile_without_rates_predicts_no_time_and_says_why() -> None:
    recipe = recipe_with()
    profile = machine(4.0)
    profile = profile.model_copy(
        update={"device": profile.device.model_copy(update={"memory_gib_per_s": None})}
    )
    plan = make_plan(model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len)), recipe, profile)
    assert plan.predicted.time is None and "time: unknown, profile rtx-4060-laptop-8gb lacks" in plan.table()


def test_several_profiles_are_compared_in_one_table_and_one_object(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli_plan("digits-vit", ["cpu-4gib", "gtx-1650-4gb"], as_json=False)
    table = capsys.readouterr().out
    assert (
        "cpu-4gib" in table
        and "gtx-1650-4gb" in table
        and "tokens/s" in table.replace("samples/s", "tokens/s")
    )
    cli_plan("digits-vit", ["cpu-4gib", "gtx-1650-4gb"], as_json=True)
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [plan["profile"]["name"] for plan in plans] == ["cpu-4gib", "gtx-1650-4gb"]
    assert all(plan["fits"] for plan in plans)


@pytest.mark.slow
def test_the_largest_model_fits_and_one_a_tenth_larger_does_not() -> None:
    small = {
        "train.seq_len": 64,
        "train.batch_size": 1,
        "offload.tier": "device",
        "model.dim": 768,
        "model.num_heads": 6,
    }
    overrides = [f"{key}={value}" for key, value in small.items()]
    said: list[str] = []
    found = largest_models("stdlib-causal", "cpu-3gib", overrides, say=said.append)
    assert any("layers: fits" in line for line in said) and any("does not fit" in line for line in said)
    for name, plan in found.items():
        model: Any = plan.recipe.model
        assert plan.fits
        heads, layers = model.num_heads, model.num_layers
        larger = (
            [f"model.num_layers={round(1.1 * layers)}"]
            if name == "deepest"
            else [f"model.dim={round(1.1 * heads) * (model.dim // heads)}"]
        )
        larger += [f"model.num_heads={round(1.1 * heads)}"] if name == "widest" else []
        base = [f"model.num_layers={layers}", f"model.dim={model.dim}", f"model.num_heads={heads}"]
        assert not plan_recipe("stdlib-causal", "cpu-3gib", [*overrides, *base, *larger]).fits


def test_a_model_of_seven_billion_parameters_is_planned_in_little_memory() -> None:
    """The plan allocates nothing of the model: a process that plans it stays below 400 MiB."""
    code = """
import sys
from lowmem.job import plan_recipe
import psutil
from lowmem.machine.monitor import anonymous_bytes
plan = plan_recipe("too-big-8gib", "cuda-8gib-host-24gib")
assert plan.fits and plan.num_parameters > 7e9, plan.num_parameters
print(anonymous_bytes(psutil.Process()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400 * MIB


def test_a_plan_that_does_not_fit_is_shown_with_the_leanest_of_what_takes_the_same() -> None:
    """The bound that refuses it counts no borders, so all places for borders come to the same there."""
    recipe = recipe_with(
        method="end_to_end",
        model={"name": "vit", "num_layers": 6, "dim": 4096, "num_heads": 32, "patch_size": 2},
        blocks={"num_blocks": 6},
        offload={"tier": "disk"},
        train={"num_steps": 1, "batch_size": 4, "lr": 1e-3},
    )
    build = model_builder(recipe, describe_data(recipe.data))
    plan = make_plan(build, recipe, load_profile("gtx-1650-4gb"))
    assert not plan.fits and plan.settings.borders == "disk"


def test_an_evaluation_is_planned_without_the_moments_of_the_shared_part() -> None:
    recipe = recipe_with(
        method="end_to_end", optimizer={"name": "adamw", "ema": 0.99}, offload={"tier": "disk"}
    )
    for changed in (recipe, recipe_with(method="end_to_end", offload={"tier": "disk"})):
        build = model_builder(changed, describe_data(changed.data))
        plan = make_plan(build, changed, load_profile("cpu-4gib"))
        with torch.device("meta"):
            _, shared = layouts_of(build(), plan.settings)
        assert plan.predicted.evaluation is not None
        assert plan.predicted.evaluation.by_category["shared_part"] == 4 * shared.numel


def test_a_larger_budget_keeps_weights_of_more_layers_and_then_whole_layers_and_moves_less() -> None:
    recipe = recipe_with(
        method="end_to_end",
        model={"name": "vit", "num_layers": 6, "dim": 512, "num_heads": 8, "patch_size": 4},
        blocks={"num_blocks": 6},
        offload={"tier": "disk", "borders": "device"},
        train={"num_steps": 4, "batch_size": 4, "micro_batch_size": 4, "lr": 1e-3},
    )
    build = model_builder(recipe, describe_data(recipe.data))
    raw = load_profile("cpu-4gib").model_dump(mode="json", by_alias=True)
    kept, moved = list[tuple[int, int]](), list[int]()
    for gib in (0.46, 0.49, 0.52, 0.55, 0.6, 0.65, 0.7, 0.8):
        memory = {"memory_gib": gib, "reserve_gib": 0.0}
        profile = profile_from_dict({**raw, "device": {**raw["device"], **memory}, "host": memory}, "test")
        plan = make_plan(build, recipe, profile)
        assert plan.fits and plan.predicted.traffic is not None
        step = plan.predicted.traffic.step
        kept.append((plan.settings.resident_layers, plan.settings.resident_weights))
        moved.append(step.disk_read_bytes + step.disk_written_bytes)
    assert kept == sorted(kept, key=lambda counts: (counts[0], sum(counts))) and kept[-1] == (6, 0)
    assert all(sum(counts) == 6 or not counts[0] for counts in kept)
    assert any(0 < weights < 6 for _, weights in kept[:4]) and any(0 < layers < 6 for layers, _ in kept)
    assert moved == sorted(moved, reverse=True) and moved[-1] == 0


def test_updates_move_larger_chunks_where_the_budget_has_room_and_a_unit_has_six_of_them() -> None:
    def planned(gib: float, dim: int, **offload: Any) -> Plan:
        recipe = recipe_with(
            method="end_to_end",
            model={"name": "vit", "num_layers": 3, "dim": dim, "num_heads": 8, "patch_size": 4},
            blocks={"num_blocks": 3},
            offload={"tier": "disk", "borders": "device", "resident_layers": 0, **offload},
            train={"num_steps": 4, "batch_size": 4, "micro_batch_size": 4, "lr": 1e-3},
        )
        raw = load_profile("cpu-4gib").model_dump(mode="json", by_alias=True)
        memory = {"memory_gib": gib, "reserve_gib": 0.0}
        profile = profile_from_dict({**raw, "device": {**raw["device"], **memory}, "host": memory}, "test")
        return make_plan(model_builder(recipe, describe_data(recipe.data)), recipe, profile)

    wide = planned(4.0, 896)
    assert wide.settings.update_chunk == 4 * CHUNK_NUMEL["cpu"]
    assert planned(4.0, 640).settings.update_chunk == 2 * CHUNK_NUMEL["cpu"]
    assert planned(4.0, 512).settings.update_chunk is None  # such chunks would be larger than a sixth
    for nothing_moves in ({"tier": "device"}, {"resident_layers": 3}, {"resident_layers": "auto"}):
        assert planned(4.0, 896, **nothing_moves).settings.update_chunk is None
    assert f"updates {4 * CHUNK_NUMEL['cpu']:,} weights at once" in wide.table()
    needed = with_headroom(wide.predicted.run_peak_bytes) / GIB
    less, least = planned(needed - 0.001, 896), planned(needed - 0.04, 896)
    assert (less.settings.update_chunk, least.settings.update_chunk) == (2 * CHUNK_NUMEL["cpu"], None)
    saved = 8 * CHUNKS * 2 * CHUNK_NUMEL["cpu"]  # two moments of fp32
    staged = [plan.predicted.by_category["staging"] for plan in (wide, less)]
    assert saved <= staged[0] - staged[1] <= saved + CHUNKS * 4 * PAGE


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({"blocks__num_blocks": 3}, "blocks of one layer or optimizer.grad_clip null"),
        ({"blocks__num_blocks": 6, "blocks__sweep_steps": 2}, "without sweeps"),
    ],
)
def test_weights_that_cannot_stay_alone_are_refused_in_one_line(
    changes: dict[str, Any], allowed: str
) -> None:
    common = {"method": "end_to_end", "offload__tier": "disk", "offload__resident_weights": 1}
    recipe = recipe_with(**common, **changes)
    with pytest.raises(ConfigError, match="offload.resident_weights: found 1") as caught:
        make_plan(model_builder(recipe, describe_data(recipe.data)), recipe, load_profile("cpu-4gib"))
    assert allowed in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("num_steps", "copies"), [(4, 0), (8, 1)])
def test_a_run_of_one_visit_is_planned_without_a_copy_of_the_shared_part(num_steps: int, copies: int) -> None:
    """Its only commit is the last one, which nothing runs beside."""
    recipe = recipe_with(
        method="end_to_end",
        blocks__visit_steps=4,
        offload__tier="disk",
        train__num_steps=num_steps,
        train__warmup_steps=1,
    )
    with torch.device("meta"):
        model = model_builder(recipe, describe_data(recipe.data))()
    profile = load_profile("cpu-4gib")
    settings = next(candidates_of(recipe, profile, model.most_blocks))[0]
    beside = settings.model_copy(update={"write_back": "beside"})
    setup = setup_of(model, recipe, profile, beside)
    assert setup.snapshot_bytes == copies * setup.shared.total_bytes


@pytest.mark.parametrize("most", [0, 1, 3, 4, 8])
def test_where_little_room_is_left_the_same_is_found_and_the_largest_is_not_planned_in_vain(
    most: int,
) -> None:
    """`most`: the largest micro-batch that fits."""
    sizes = [SimpleNamespace(micro_batch_size=size) for size in (8, 4, 2, 1)]
    found, calls = list[int](), list[int]()
    for tight in (False, True):

        def planned(settings: Any) -> Any:
            size = settings.micro_batch_size
            calls.append(size)
            predicted = SimpleNamespace(run_peak_bytes=GIB * size)
            budget = SimpleNamespace(device_bytes=with_headroom(GIB * most))
            return SimpleNamespace(settings=settings, fits=size <= most, predicted=predicted, budget=budget)

        calls.clear()
        plan = plan_module._largest_that_fits(sizes, planned, tight)  # type: ignore[arg-type]
        found.append(plan.settings.micro_batch_size)
    assert found == [found[0]] * 2 and found[0] == max(
        [size for size in (1, 2, 4, 8) if size <= most], default=1
    )
    assert (calls == [1]) == (most == 0)
    assert len(calls) == len(set(calls))
