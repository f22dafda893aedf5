"""Lists what the settings that a recipe leaves `auto` may become, best first, and says why they became it.

The plan takes the first candidate that fits. Two settings follow from the others (`settled`): whether updates
run during backward, and whether a block is written beside the next step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

from lowmem.blocks.optim import has_muon
from lowmem.errors import ConfigError
from lowmem.machine.device import has_fp16_accumulation
from lowmem.machine.profile import Profile
from lowmem.planning.settings import Settings, Setup
from lowmem.recipe import Frozen, NoiseConfig, OptimizerName, Precision, Recipe, Tier
from lowmem.units import MIB

# A visit that writes less than this waits for the write. Waiting takes milliseconds, and after a kill at most
# one visit is repeated.
NO_8_BIT = ("mps", "xpu")  # types of device without an 8-bit kernel that has run here
WRITE_BESIDE_BYTES = 32 * MIB
TIERS: tuple[Tier, ...] = ("device", "host", "disk")  # fastest first


class Place(NamedTuple):
    """Where a candidate keeps things, and how many blocks it has."""

    num_blocks: int
    tier: Tier
    recompute: bool
    borders: Tier
    shared: Literal["device", "tier"] = "device"


def candidates_of(recipe: Recipe, profile: Profile, num_layers: int) -> Iterator[list[Settings]]:
    """All settings that the recipe allows, best first.

    They come in lists whose members differ in the micro-batch alone, largest first. `num_layers`: of the
    model. Raises ConfigError for more blocks than layers, for settings that exclude each other, and for
    weights that need another precision.
    """
    num_blocks = recipe.blocks.num_blocks
    if num_blocks != "auto" and num_blocks > num_layers:
        raise ConfigError(
            f"blocks.num_blocks: found {num_blocks}; "
            f"allowed: at most the model's {num_layers} layers; lower it"
        )
    # auto: 0 until the plan knows what its budget leaves
    stay, held = recipe.offload.resident_layers, recipe.offload.resident_weights
    places = _whole_places if recipe.whole else _block_places
    _check_shared(recipe, profile)
    for place in places(recipe, profile, num_layers):
        yield [
            Settings(
                num_blocks=place.num_blocks,
                micro_batch_size=size,
                precision=_precision(recipe, profile),
                weights="float32" if recipe.train.weights == "auto" else recipe.train.weights,
                frozen=_frozen(recipe, profile),
                recompute=place.recompute,
                optimizer=_optimizer(recipe, profile),
                ema=recipe.optimizer.ema is not None,
                in_rounds=recipe.blocks.order == "together",
                tier=place.tier,
                borders=place.borders,
                shared=place.shared,
                resident_layers=0 if stay == "auto" else stay,
                resident_weights=0 if held == "auto" else held,
                write_back="wait",  # until `settled`
            )
            for size in _micro_batch_sizes(recipe)
        ]


def _block_places(recipe: Recipe, profile: Profile, num_layers: int) -> Iterator[Place]:
    """Blocks that take turns: fewest blocks first, then the fastest tier, then no recompute."""
    num_blocks = recipe.blocks.num_blocks
    counts = range(1, num_layers + 1) if num_blocks == "auto" else [num_blocks]
    for count, tier, recompute in itertools.product(
        counts, _tiers(recipe.offload.tier, profile), _recomputes(recipe)
    ):
        yield Place(count, tier, recompute, "device")


def _whole_places(recipe: Recipe, profile: Profile, num_layers: int) -> Iterator[Place]:
    """A model whose loss is that of all blocks: a faster tier first, then no recompute, the shared part's
    state on the device, faster borders, fewer blocks.

    Recompute costs more time than moving borders does, and moving borders more than more blocks do.
    """
    given = recipe.blocks.num_blocks
    streaming = range(2, num_layers + 1)  # streaming a single block would save nothing
    for tier, recompute in itertools.product(_whole_tiers(recipe, profile), _recomputes(recipe)):
        if recompute and tier != "device" and recipe.train.recompute == "auto":
            continue  # a unit that streams is made again from its border in any case
        single = tier == "device" and recipe.method == "end_to_end"
        counts = [given] if given != "auto" else [1] if single else streaming
        borders: list[Tier] = ["device"] if tier == "device" else _tiers(recipe.offload.borders, profile)
        for shared, border, count in itertools.product(
            _shared_places(recipe, profile, tier), borders, counts
        ):
            yield Place(count, tier, recompute, border, shared)


def _shared_places(recipe: Recipe, profile: Profile, tier: Tier) -> list[Literal["device", "tier"]]:
    """Where the shared part's state may rest: with the blocks too, where these stream unit by unit and are
    updated.
    """
    given, blocks = recipe.offload.shared, recipe.blocks
    resident = tier == "device" or (tier == "host" and profile.unified)
    exact = recipe.method == "end_to_end" and blocks.sweep_steps == 1 and blocks.grow_at is None
    allowed: list[Literal["device", "tier"]] = ["device"]
    if exact and not resident and recipe.adapter is None and not recipe.model.freezes:
        allowed.append("tier")
    return allowed if given == "auto" else [place for place in allowed if place == given]


def _check_shared(recipe: Recipe, profile: Profile) -> None:
    """Raises ConfigError where the shared part's state is to rest with the blocks and cannot."""
    whole = recipe.method == "end_to_end"
    places = [
        place
        for tier in (_whole_tiers(recipe, profile) if whole else [])
        for place in _shared_places(recipe, profile, tier)
    ]
    if recipe.offload.shared == "tier" and not places:
        raise ConfigError(
            "offload.shared: found tier; allowed where all weights of a model that is trained end to end "
            "stream in each step: device, tier; set offload.shared: auto"
        )


def _whole_tiers(recipe: Recipe, profile: Profile) -> list[Tier]:
    """The tiers allowed for a model trained end to end.

    A single block cannot stream. Updates during backward cannot either: the shared part's gradients gather
    over two passes.
    """
    tiers = _tiers(recipe.offload.tier, profile)
    needs_residence = {
        "blocks.num_blocks 1": recipe.blocks.num_blocks == 1,
        "optimizer.during_backward true": recipe.optimizer.during_backward is True,
    }
    because = next((key for key, given in needs_residence.items() if given), None)
    if because is None:
        return tiers
    resident: list[Tier] = [
        tier for tier in tiers if tier == "device" or (tier == "host" and profile.unified)
    ]
    if not resident:
        raise ConfigError(
            f"offload.tier: found '{recipe.offload.tier}'; allowed with method end_to_end and {because}: "
            "device, auto; change one of them"
        )
    return resident


def _tiers(given: Tier | Literal["auto"], profile: Profile) -> list[Tier]:
    if given != "auto":
        return [given]
    return [tier for tier in TIERS if tier != "host" or not profile.unified]  # unified: host is device


def _recomputes(recipe: Recipe) -> list[bool]:
    return [False, True] if recipe.train.recompute == "auto" else [recipe.train.recompute]


def _micro_batch_sizes(recipe: Recipe) -> list[int]:
    """Sizes that divide the batch, largest first; only the whole batch where updates run during backward."""
    train = recipe.train
    if train.micro_batch_size != "auto":
        return [train.micro_batch_size]
    if recipe.optimizer.during_backward is True:
        return [train.batch_size]
    small = [n for n in range(1, math.isqrt(train.batch_size) + 1) if train.batch_size % n == 0]
    return sorted({*small, *(train.batch_size // n for n in small)}, reverse=True)


def _precision(recipe: Recipe, profile: Profile) -> Precision:
    if recipe.train.fp16_accumulation and profile.device.type != "cuda":
        raise ConfigError(
            f"train.fp16_accumulation: found true; allowed on device type {profile.device.type} (profile "
            f"{profile.name}): false; leave it out"
        )
    if recipe.train.fp16_accumulation and not has_fp16_accumulation():
        raise ConfigError(
            "train.fp16_accumulation: found true; allowed where torch has it (2.7 or later): false; "
            "install a newer torch"
        )
    if recipe.train.precision != "auto":
        return recipe.train.precision
    if profile.device.compute_dtype == "bfloat16":
        return "bfloat16"
    if recipe.train.weights == "bfloat16":
        raise ConfigError(
            f"train.weights: found bfloat16; allowed where train.precision is auto and profile "
            f"{profile.name} computes in {profile.device.compute_dtype}: float32; "
            "set train.precision: bfloat16"
        )
    return "float32"


def _frozen(recipe: Recipe, profile: Profile) -> Frozen | None:
    """How frozen weights are kept, where there are some."""
    if recipe.adapter is not None:
        return recipe.adapter.base
    precision = _precision(recipe, profile)
    return precision if recipe.model.freezes and precision != "float16" else None


def _optimizer(recipe: Recipe, profile: Profile) -> OptimizerName:
    """8-bit state costs no time on CUDA. On a CPU torch's fused fp32 kernel is 13 to 40 times faster."""
    if recipe.optimizer.name == "adamw8bit" and profile.device.type in NO_8_BIT:
        raise ConfigError(
            f"optimizer.name: found adamw8bit; allowed on device type {profile.device.type} (profile "
            f"{profile.name}): adamw; "
            "there is no 8-bit kernel for it: set optimizer.name: adamw"
        )
    if recipe.optimizer.name == "muon" and not has_muon():
        raise ConfigError(
            "optimizer.name: found muon; allowed where torch has it (2.9 or later): adamw, adamw8bit; "
            "install a newer torch"
        )
    if recipe.optimizer.name != "auto":
        return recipe.optimizer.name
    return "adamw8bit" if profile.device.type == "cuda" else "adamw"


# ------------------------------------------------------------------------------------------------------------
# Settings that follow from the others


def settled(setup: Setup) -> Setup:
    """`setup` with `during_backward` and `write_back` as they follow from the rest of it."""
    changes = {"during_backward": _during_backward(setup), "write_back": _write_back(setup)}
    return replace(setup, settings=setup.settings.model_copy(update=changes))


def _during_backward(setup: Setup) -> bool:
    """Updates run during backward wherever no gradient has to wait for another.

    That saves the memory of the gradients and changes no bit.
    """
    optimizer = setup.recipe.optimizer
    allowed = (
        optimizer.grad_clip is None
        and setup.micro_batches == 1
        and not (setup.streams or setup.swept or setup.frozen or setup.coordinate)
    )
    return allowed and optimizer.during_backward is not False


def _write_back(setup: Setup) -> Literal["beside", "wait"]:
    if setup.together:
        return "wait"  # the next step would change what is being written
    if setup.recipe.offload.write_back != "auto":
        return setup.recipe.offload.write_back
    if (setup.streams and setup.end_to_end) or setup.swept:
        return "beside"  # the next step begins with a forward pass, which changes nothing
    largest = max(layout.total_bytes for layout in setup.layouts)
    return "beside" if largest + setup.shared.total_bytes > WRITE_BESIDE_BYTES else "wait"


# ------------------------------------------------------------------------------------------------------------
# Reasons


def choices_of(recipe: Recipe, profile: Profile, settings: Settings, noise: NoiseConfig) -> list[str]:
    """One line for each setting that the recipe left open: what it became, and why.

    `noise`: the recipe's, with what its schedule measures from the targets.
    """
    train, optimizer = recipe.train, recipe.optimizer
    visit_steps, sweep_steps = recipe.blocks.visit_steps, recipe.blocks.sweep_steps
    whole_sweeps = -(-visit_steps // sweep_steps) * sweep_steps
    lines = [
        (
            whole_sweeps != visit_steps,
            f"blocks.visit_steps {whole_sweeps}: {visit_steps} rounded up to whole sweeps of {sweep_steps} "
            "steps",
        ),
        (
            recipe.noise.schedule != "lognormal",
            f"noise.schedule {recipe.noise.schedule}: ln sigma ~ N({noise.p_mean:.2f}, {noise.p_std:.2f}), "
            "measured from the targets",
        ),
        (
            recipe.blocks.num_blocks == "auto",
            f"blocks.num_blocks {settings.num_blocks}: the fewest that fit",
        ),
        (
            train.micro_batch_size == "auto",
            f"train.micro_batch_size {settings.micro_batch_size}: "
            f"the largest that fits, of batch {train.batch_size}",
        ),
        (
            train.recompute == "auto",
            f"train.recompute {str(settings.recompute).lower()}: "
            f"{'needed to fit' if settings.recompute else 'fits without'}",
        ),
        (
            train.precision == "auto",
            f"train.precision {settings.precision}: the profile computes in {profile.device.compute_dtype}",
        ),
        (
            optimizer.name == "auto",
            f"optimizer.name {settings.optimizer}: {_why_optimizer(settings, profile)}",
        ),
        (
            optimizer.during_backward == "auto" and settings.during_backward,
            "optimizer.during_backward true: no clipping and one micro-batch; "
            "gradients alive are counted with the activations",
        ),
    ]
    return [line for holds, line in lines if holds] + _offload_choices(recipe, settings)


def _why_optimizer(settings: Settings, profile: Profile) -> str:
    if settings.optimizer == "adamw8bit":
        return "8-bit state costs no time on CUDA"
    if profile.device.type in NO_8_BIT:
        return f"there is no 8-bit kernel for device type {profile.device.type}"
    return "on a CPU 8-bit state costs much time"


def _offload_choices(recipe: Recipe, settings: Settings) -> list[str]:
    away = settings.tier != "device"
    streams = recipe.whole and away
    tier_auto, borders_auto = recipe.offload.tier == "auto", recipe.offload.borders == "auto"
    if streams:
        why = (
            "all blocks do not fit on the device at once, so they stream, one at a time, "
            "and every step is as exact"
        )
    else:
        why = "the first that fits" if away else "every block fits on the device"
    lines = [
        (tier_auto, f"offload.tier {settings.tier}: {why}"),
        (
            tier_auto and streams and borders_auto,
            f"offload.borders {settings.borders}: the fastest that fits, for activations at block borders",
        ),
        (
            recipe.offload.shared == "auto" and settings.shared == "tier",
            "offload.shared tier: with its moments on the device the shared part does not fit",
        ),
        (
            recipe.optimizer.clips_whole and away,
            "optimizer.clip global: the norm needs a backward pass of its own, "
            "so a step takes 7/4 of the operations that clip block takes",
        ),
    ]
    return [line for holds, line in lines if holds]
