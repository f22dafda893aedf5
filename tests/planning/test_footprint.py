"""Counting: storages from birth to death, weights and gradients once and not as activations."""

from __future__ import annotations

import pytest
import torch
from conftest import recipe_with
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem.blocks.staging import CHUNK_BYTES, RING_CHUNKS
from lowmem.data.datasets import describe_data
from lowmem.machine.profile import load_profile
from lowmem.models import model_builder
from lowmem.planning import footprint
from lowmem.planning.duration import Work
from lowmem.planning.passes import Large, LiveBytes, Pass, PassCounter
from lowmem.planning.plan import make_plan
from lowmem.planning.settings import layouts_of, setup_of
from lowmem.units import MIB


def test_storages_count_from_birth_to_death_and_views_not_at_all() -> None:
    with FakeTensorMode():
        old = torch.zeros(1000)
        with LiveBytes(old) as counter:
            view = old[:10].view(2, 5).t()
            assert counter.live == 0
            fresh = torch.empty(256)
            doubled = fresh * 2
            assert counter.live == 2 * 1024
            del fresh
            assert counter.live == 1024
            slices = doubled[:3]
            del doubled
            assert counter.live == 1024, "a view keeps the storage alive"
            del slices, view
        assert (counter.live, counter.peak) == (0, 2 * 1024)


def test_small_storages_count_with_the_gaps_between_them_in_the_heap_and_large_ones_as_they_are() -> None:
    with FakeTensorMode(), LiveBytes(in_heap=True) as counter:
        small = torch.empty(1000, dtype=torch.uint8)
        assert counter.live == 1330
        large = torch.empty(MIB, dtype=torch.uint8)
        assert counter.live == 1330 + MIB
        del small, large
    assert counter.live == 0


def test_large_results_that_no_pool_lends_are_counted_apart() -> None:
    with FakeTensorMode(), LiveBytes(in_heap=True) as counter:
        x = torch.zeros(MIB // 4)  # not lent, and there all the time
        doubled = x * 2
        other = torch.cumsum(doubled, 0)
        assert counter.large == (3 * MIB, 3 * MIB, 2 * MIB)
        del doubled, other
        assert (x * 3 * 4).numel()
    assert counter.large == (3 * MIB, 5 * MIB, 2 * MIB)


def test_a_pool_and_what_it_never_lends_take_no_more_than_is_planned() -> None:
    """Where borders stay on the device, they are lent too, and planned beside the activations."""
    plans = {}
    for borders in ("device", "host"):
        recipe = recipe_with(
            method="end_to_end",
            model__dim=512,
            train__batch_size=256,
            blocks__num_blocks=3,
            offload__tier="disk",
            offload__resident_layers=0,
            offload__borders=borders,
        )
        build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
        plan = make_plan(build, recipe, load_profile("cpu-16gib"))
        plans[borders] = plan.predicted
    with torch.device("meta"):
        model = build()
    setup = setup_of(model, recipe, load_profile("cpu-16gib"), plan.settings)
    passes = [
        Pass(0, Work({(0, 0): 1}), Work(), Large(*(size * MIB for size in sizes)))
        for sizes in ((100, 10**6, 20), (70, 10**6, 30))
    ]
    assert footprint._pool_bytes(setup, passes, 0) == (100 - 30) * MIB
    near, away = plans["device"], plans["host"]
    assert 0 < away.pool_bytes < away.by_category["activations"]
    lent = near.pool_bytes - away.pool_bytes
    assert lent > MIB and lent < near.by_category["borders"]
    assert near.pool_bytes < near.by_category["activations"] + near.by_category["borders"]


def test_weights_and_gradients_are_not_counted_as_activations() -> None:
    """One sample through wide layers: what is alive is a few temporary weight gradients, far below the
    weights themselves.
    """
    recipe = recipe_with(model__dim=512, train__micro_batch_size=1)
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    plan = make_plan(build, recipe, load_profile("cpu-16gib"))
    with torch.device("meta"):
        model = build()
    activations = PassCounter(model, model.make_objective(recipe.noise), recipe)(
        range(2), plan.settings
    ).peak_bytes
    block = layouts_of(model, plan.settings)[0][0]
    largest = max(slot.numel for slot in block.slots) * 4
    assert largest < activations < 3 * largest < block.weights_bytes


def test_activations_grow_with_the_micro_batch_and_shrink_with_recompute() -> None:
    recipe = recipe_with(method="end_to_end", train__batch_size=256)
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    with torch.device("meta"):
        model = build()
    counter = PassCounter(model, model.make_objective(recipe.noise), recipe)
    settings = make_plan(build, recipe, load_profile("cpu-16gib")).settings
    small, large = (
        counter(range(6), settings.model_copy(update={"micro_batch_size": size})).peak_bytes
        for size in (64, 256)
    )
    assert large == pytest.approx(4 * small, rel=0.05)
    assert (
        counter(range(6), settings.model_copy(update={"micro_batch_size": 256, "recompute": True})).peak_bytes
        < large / 3
    )
    assert large > 50 * MIB


@pytest.mark.parametrize(
    ("machine", "tier", "device_slots", "rings"),
    [
        ("cpu-16gib", "device", 0, 0),
        ("cpu-16gib", "host", 0, 0),  # the same memory: no second copy
        ("cpu-16gib", "disk", 2, 0),
        ("jetson-orin-nano-8gb", "host", 0, 1),
        ("jetson-orin-nano-8gb", "disk", 1, 1),
        ("rtx-3060-12gb", "device", 0, 1),
        ("rtx-3060-12gb", "host", 1, 1),
        ("rtx-3060-12gb", "disk", 1, 1),
    ],
)
def test_staging_is_slots_beside_the_block_in_compute_a_ring_and_a_snapshot_of_the_shared_part(
    machine: str, tier: str, device_slots: int, rings: int
) -> None:
    recipe = recipe_with(model__dim=512, offload__tier=tier, optimizer__name="adamw")
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    profile = load_profile(machine)
    plan = make_plan(build, recipe, profile)
    with torch.device("meta"):
        blocks, shared = layouts_of(build(), plan.settings)
    slot = max(block.total_bytes for block in blocks)
    assert slot > CHUNK_BYTES
    device, host = device_slots * slot, shared.total_bytes + rings * RING_CHUNKS * CHUNK_BYTES
    found = plan.predicted.by_category["staging"], plan.predicted.host_by_category["staging"]
    assert found == ((device + host,) * 2 if profile.unified else (device, host))


@pytest.mark.parametrize("machine", ["cpu-16gib", "jetson-orin-nano-8gb", "rtx-3060-12gb"])
def test_data_count_once_in_the_memory_that_holds_them(machine: str) -> None:
    recipe, profile = recipe_with(), load_profile(machine)
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    without, holding = (
        make_plan(build, recipe, profile, data_bytes=num_bytes).predicted for num_bytes in (0, 5 * MIB)
    )
    assert holding.host_peak_bytes - without.host_peak_bytes == 5 * MIB
    on_device = holding.device_peak_bytes - without.device_peak_bytes
    assert on_device == (5 * MIB if profile.unified else 0)
    assert holding.disk_bytes == without.disk_bytes


@pytest.mark.parametrize("method", ["diffusion_blocks", "end_to_end"])
@pytest.mark.parametrize("machine", ["cpu-16gib", "jetson-orin-nano-8gb", "rtx-3060-12gb"])
def test_categories_add_up_to_the_peaks_and_the_worst_block_has_the_devices(
    machine: str, method: str
) -> None:
    recipe, profile = recipe_with(method=method, offload__tier="disk"), load_profile(machine)
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    predicted = make_plan(build, recipe, profile).predicted
    assert sum(predicted.by_category.values()) == predicted.device_peak_bytes
    assert sum(predicted.host_by_category.values()) == predicted.host_peak_bytes
    assert max(predicted.block_peak_bytes) == predicted.device_peak_bytes
    assert len(predicted.block_peak_bytes) == 3
