"""What a recipe leaves `auto`: all that it may become, best first, and why it became what it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

from lowmem.blocks.arena import ArenaLayout
from lowmem.errors import ConfigError
from lowmem.machine.profile import Profile
from lowmem.planning.settings import Settings
from lowmem.recipe import NoiseConfig, OptimizerName, Precision, Recipe, Tier
from lowmem.units import MIB

WRITE_BESIDE_BYTES = (
    32 * MIB
)  # less is written before the next step: it takes milliseconds, and a kill then repeats one visit at most


def candidates_of(recipe: Recipe, profile: Profile, num_layers: int) -> Iterator[list[Settings]]:
    """All that the recipe allows, best first, in lists that differ in the micro-batch alone, largest first."""
    blocks, offload, train = recipe.blocks, recipe.offload, recipe.train
    if blocks.num_blocks != "auto" and blocks.num_blocks > num_layers:
        raise ConfigError(
            f"blocks.num_blocks: found {blocks.num_blocks}; allowed: at most the model's {num_layers} layers; lower it"
        )
    tiers: list[Tier] = ["device", "host", "disk"]
    if profile.unified:
        tiers.remove("host")  # the same memory
    micro = [train.batch_size // n for n in range(1, train.batch_size + 1) if train.batch_size % n == 0]
    if recipe.optimizer.during_backward is True:
        micro = micro[:1]
    recomputes = [False, True] if train.recompute == "auto" else [train.recompute]
    resting = tiers if offload.tier == "auto" else [offload.tier]
    order: Iterator[tuple[int, Tier, bool, Tier]]
    if recipe.method == "end_to_end":
        # to stream a single block would save nothing; while blocks stream, the shared part's gradients gather
        # over two passes
        together = {
            "blocks.num_blocks 1": blocks.num_blocks == 1,
            "optimizer.during_backward true": recipe.optimizer.during_backward is True,
        }
        if any(together.values()):
            resting = [tier for tier in resting if tier == "device" or (tier == "host" and profile.unified)]
        if not resting:
            because = next(key for key, given in together.items() if given)
            raise ConfigError(
                f"offload.tier: found '{offload.tier}'; allowed with method end_to_end and {because}: device, auto; change one of them"
            )
        order = (
            (count, tier, recompute, borders)
            for tier, recompute in itertools.product(
                resting, recomputes
            )  # costs more than to move borders, and that more than more blocks
            for borders in (
                tiers[:1] if tier == "device" else tiers if offload.borders == "auto" else [offload.borders]
            )
            for count in (
                [blocks.num_blocks]
                if blocks.num_blocks != "auto"
                else [1]
                if tier == "device"
                else range(2, num_layers + 1)
            )
        )
    else:
        counts = range(1, num_layers + 1) if blocks.num_blocks == "auto" else [blocks.num_blocks]
        order = (
            (count, tier, recompute, tiers[0])
            for count, tier, recompute in itertools.product(counts, resting, recomputes)
        )
    for count, tier, recompute, borders in order:
        yield [
            Settings(
                num_blocks=count,
                micro_batch_size=size,
                precision=_precision(recipe, profile),
                weights="float32" if train.weights == "auto" else train.weights,
                recompute=recompute,
                optimizer=_optimizer(recipe, profile),
                ema=recipe.optimizer.ema is not None,
                tier=tier,
                borders=borders,
                write_back="wait",
            )
            for size in (micro if train.micro_batch_size == "auto" else [train.micro_batch_size])
        ]


def _precision(recipe: Recipe, profile: Profile) -> Precision:
    if recipe.train.precision != "auto":
        return recipe.train.precision
    if profile.device.compute_dtype == "bfloat16":
        return "bfloat16"
    if recipe.train.weights == "bfloat16":
        raise ConfigError(
            f"train.weights: found bfloat16; allowed where train.precision is auto and profile {profile.name} computes in "
            f"{profile.device.compute_dtype}: float32; set train.precision: bfloat16"
        )
    return "float32"


def _optimizer(recipe: Recipe, profile: Profile) -> OptimizerName:
    """8-bit state costs no time on CUDA and much on a CPU, where torch's fused fp32 kernel is 13 to 40 times
    faster.
    """
    if recipe.optimizer.name != "auto":
        return recipe.optimizer.name
    return "adamw8bit" if profile.device.type == "cuda" else "adamw"


def during_backward(recipe: Recipe, micro_batch_size: int, streams_whole: bool) -> bool:
    """Wherever no gradient has to wait for another: it saves their memory and changes no bit."""
    allowed = (
        recipe.optimizer.grad_clip is None
        and micro_batch_size == recipe.train.batch_size
        and not streams_whole
    )
    return allowed and recipe.optimizer.during_backward is not False


def write_back(
    recipe: Recipe, streams_whole: bool, layouts: list[ArenaLayout], shared: ArenaLayout
) -> Literal["beside", "wait"]:
    if recipe.method == "end_to_end" and not streams_whole:
        return "wait"  # the next step would change what is being written
    if recipe.offload.write_back != "auto":
        return recipe.offload.write_back
    if streams_whole:
        return "beside"  # the next step begins with a forward pass, which changes nothing
    return (
        "beside"
        if max(layout.total_bytes for layout in layouts) + shared.total_bytes > WRITE_BESIDE_BYTES
        else "wait"
    )


def choices_of(recipe: Recipe, profile: Profile, settings: Settings, noise: NoiseConfig) -> list[str]:
    lines = []
    if recipe.noise.schedule != "lognormal":
        lines.append(
            f"noise.schedule {recipe.noise.schedule}: ln sigma ~ N({noise.p_mean:.2f}, {noise.p_std:.2f}), measured from the targets"
        )
    if recipe.blocks.num_blocks == "auto":
        lines.append(f"blocks.num_blocks {settings.num_blocks}: the fewest that fit")
    if recipe.train.micro_batch_size == "auto":
        lines.append(
            f"train.micro_batch_size {settings.micro_batch_size}: the largest that fits, of batch {recipe.train.batch_size}"
        )
    if recipe.train.recompute == "auto":
        lines.append(
            f"train.recompute {str(settings.recompute).lower()}: "
            + ("needed to fit" if settings.recompute else "fits without")
        )
    if recipe.train.precision == "auto":
        lines.append(
            f"train.precision {settings.precision}: the profile computes in {profile.device.compute_dtype}"
        )
    if recipe.optimizer.name == "auto":
        why = (
            "8-bit state costs no time on CUDA"
            if settings.optimizer == "adamw8bit"
            else "on a CPU 8-bit state costs much time"
        )
        lines.append(f"optimizer.name {settings.optimizer}: {why}")
    if recipe.optimizer.during_backward == "auto" and settings.during_backward:
        lines.append(
            "optimizer.during_backward true: no clipping and one micro-batch; gradients alive are counted with the activations"
        )
    if recipe.offload.tier == "auto":
        why = "every block fits on the device" if settings.tier == "device" else "the first that fits"
        if recipe.method == "end_to_end" and settings.tier != "device":
            why = "all blocks do not fit on the device at once, so they stream, one at a time, and every step is as exact"
        lines.append(f"offload.tier {settings.tier}: {why}")
        if recipe.method == "end_to_end" and settings.tier != "device" and recipe.offload.borders == "auto":
            lines.append(
                f"offload.borders {settings.borders}: the fastest that fits, for activations at block borders"
            )
    if recipe.optimizer.clips_whole and settings.tier != "device":
        lines.append(
            "optimizer.clip global: the norm needs a backward pass of its own, so a step takes 7/4 of the operations that clip block takes"
        )
    return lines
