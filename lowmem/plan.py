"""The budget before the run: what it will take against what the profile allows, and the choice of whatever is `auto`."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from lowmem.arena import ArenaLayout
from lowmem.block_queue import BlockQueue
from lowmem.config import NoiseConfig, OptimizerName, Precision, Recipe, Tier
from lowmem.errors import BudgetError, ConfigError, StoreError
from lowmem.footprint import ActivationCounter, Predicted, Settings, check_model, is_resident, layouts_of, predict
from lowmem.hardware import DeviceSpec, HostSpec, Profile
from lowmem.models.base import BuildModel
from lowmem.noise import settled_noise
from lowmem.run_dir import RunDir
from lowmem.strict import Section, parse
from lowmem.tables import text_table
from lowmem.traffic import traffic_lines
from lowmem.units import MIB, format_bytes, from_gib

WRITE_BESIDE_BYTES = 32 * MIB  # less is written before the next step: it takes milliseconds, and a kill then repeats one visit at most


class Budget(Section):
    """Bytes that the profile allows. On unified memory device and host are one pool."""

    device_bytes: int
    host_bytes: int
    disk_bytes: int | None  # None: another machine's disk, unknown


class Plan(Section):
    schema_version: Literal[1] = Field(default=1, alias="schema")
    recipe: Recipe
    profile: Profile
    noise: NoiseConfig  # the recipe's, with what its schedule measures settled
    settings: Settings
    budget: Budget
    predicted: Predicted
    num_parameters: int
    choices: list[str]  # what was `auto`, and why it became what it is

    @property
    def fits(self) -> bool:
        disk = self.budget.disk_bytes
        return (
            self.predicted.device_peak_bytes <= self.budget.device_bytes
            and self.predicted.host_peak_bytes <= self.budget.host_bytes
            and (disk is None or self.predicted.disk_bytes <= disk)
        )

    def require_fit(self) -> None:
        """Raises BudgetError, with the table, naming the largest part and what to change."""
        if not self.fits:
            raise BudgetError(_advice(self), self.table())

    def queue(self) -> BlockQueue:
        recipe = self.recipe
        return BlockQueue(
            recipe.method, self.settings.num_blocks, recipe.train.num_steps, recipe.blocks.visit_steps, recipe.blocks.order, recipe.train.seed
        )

    def to_dict(self) -> dict[str, Any]:
        return {**self.model_dump(mode="json", by_alias=True), "fits": self.fits}

    def table(self) -> str:
        budget, predicted = self.budget, self.predicted
        rows = [
            (name.replace("_", " "), format_bytes(num_bytes), f"{num_bytes / predicted.device_peak_bytes:.0%}")
            for name, num_bytes in predicted.by_category.items()
        ]
        rows.append(("device peak", format_bytes(predicted.device_peak_bytes), f"{predicted.device_peak_bytes / budget.device_bytes:.0%} of budget"))
        settings = self.settings
        notes = [
            f"device  {_bar(predicted.device_peak_bytes, budget.device_bytes)}   ({self.profile.device.type}, {self.profile.name})",
            f"host    {_bar(predicted.host_peak_bytes, budget.host_bytes)}" + ("   (the same memory as the device)" if self.profile.unified else ""),
            f"disk    {_bar(predicted.disk_bytes, budget.disk_bytes)}",
            f"settings: {settings.num_blocks} blocks, tier {settings.tier}, micro-batch {settings.micro_batch_size}, {settings.precision}, "
            f"weights {settings.weights}, {settings.optimizer}, recompute {'on' if settings.recompute else 'off'}, "
            f"updates {'during' if settings.during_backward else 'after'} backward, write-back {settings.write_back}",
            *(traffic_lines(predicted.traffic) if predicted.traffic else []),
            *(f"chosen: {choice}" for choice in self.choices if self.fits),
            f"{'fits' if self.fits else 'DOES NOT FIT'}",
        ]
        title = f"plan: {self.recipe.method}, {self.recipe.model.name}, {self.num_parameters / 1e6:.2f} million parameters"
        return text_table(title, ("device memory", "predicted", "share"), rows, notes)


def make_plan(build_model: BuildModel, recipe: Recipe, profile: Profile, folder: Path | None = None, data_bytes: int = 0) -> Plan:
    """The first candidate that fits: fewest blocks, then the fastest tier, no recompute, the largest micro-batch.

    If none fits, the smallest candidate, with `fits` false. `folder`: where the run will be (its disk's free space is the
    disk budget); None: unknown. `data_bytes`: what the data hold in host memory. Nothing is allocated: the model is built on the meta device.
    """
    with torch.device("meta"):
        model = build_model()
        table = getattr(model, "target_table", None)
        noise = settled_noise(recipe.noise, None if table is None else tuple(table().shape))
    check_model(model)
    counter = ActivationCounter(model, recipe)
    budget = Budget(
        device_bytes=profile.device_budget_bytes,
        host_bytes=profile.host_budget_bytes,
        disk_bytes=None if folder is None else max(_free_bytes(folder) - from_gib(profile.disk.reserve_gib), 0),
    )

    def planned(settings: Settings) -> Plan:
        streams_whole = recipe.method == "end_to_end" and not is_resident(settings, profile.unified)
        settings = settings.model_copy(
            update={
                "write_back": _write_back(recipe, streams_whole, *layouts_of(model, settings)),
                "during_backward": _during_backward(recipe, settings.micro_batch_size, streams_whole),
            }
        )
        return Plan(
            recipe=recipe,
            profile=profile,
            noise=noise,
            settings=settings,
            budget=budget,
            predicted=predict(model, recipe, profile, settings, counter, data_bytes),
            num_parameters=sum(p.numel() for p in model.parameters()),
            choices=_choices(recipe, profile, settings, noise),
        )

    smallest: Plan | None = None
    for candidates in _candidates(recipe, profile, len(model.layers)):
        plan = _largest_that_fits(candidates, planned)
        if plan.fits:
            return plan
        if smallest is None or _excess(plan) < _excess(smallest):
            smallest = plan
    assert smallest is not None
    return smallest


def read_plan(run: RunDir) -> Plan:
    """The frozen plan of a run folder. A key that it was made without has its default. Raises ResumeError, StoreError."""
    raw = {key: value for key, value in run.read_plan().items() if key != "fits"}
    return parse(Plan, raw, str(run.plan_path), StoreError)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def _largest_that_fits(candidates: list[Settings], planned: Callable[[Settings], Plan]) -> Plan:
    """Of candidates that differ in the micro-batch alone, largest first; where none fits, the smallest.

    To plan one takes up to a second or two. Activations grow about in proportion to the micro-batch, so the search begins where that
    leads, and few are looked at.
    """
    plan = planned(candidates[0])
    if plan.fits or len(candidates) == 1:
        return plan
    activations = plan.predicted.by_category["activations"]
    room = plan.budget.device_bytes - (plan.predicted.device_peak_bytes - activations)
    wanted = plan.settings.micro_batch_size * room / activations
    last = len(candidates) - 1
    index = next((i for i in range(1, last) if candidates[i].micro_batch_size <= wanted), last)
    plan = planned(candidates[index])
    while not plan.fits and index < last:
        index += 1
        plan = planned(candidates[index])
    while plan.fits and index > 1 and (larger := planned(candidates[index - 1])).fits:
        index -= 1
        plan = larger
    return plan


def _candidates(recipe: Recipe, profile: Profile, num_layers: int) -> Iterator[list[Settings]]:
    """All that the recipe allows, best first, in lists that differ in the micro-batch alone, largest first."""
    blocks, offload, train = recipe.blocks, recipe.offload, recipe.train
    if blocks.num_blocks != "auto" and blocks.num_blocks > num_layers:
        raise ConfigError(f"blocks.num_blocks: found {blocks.num_blocks}; allowed: at most the model's {num_layers} layers; lower it")
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
        # to stream a single block would save nothing; while blocks stream, the shared part's gradients gather over two passes
        together = {"blocks.num_blocks 1": blocks.num_blocks == 1, "optimizer.during_backward true": recipe.optimizer.during_backward is True}
        if any(together.values()):
            resting = [tier for tier in resting if tier == "device" or (tier == "host" and profile.unified)]
        if not resting:
            because = next(key for key, given in together.items() if given)
            raise ConfigError(f"offload.tier: found '{offload.tier}'; allowed with method end_to_end and {because}: device, auto; change one of them")
        order = (
            (count, tier, recompute, borders)
            for tier, recompute in itertools.product(resting, recomputes)  # costs more than to move borders, and that more than more blocks
            for borders in (tiers[:1] if tier == "device" else tiers if offload.borders == "auto" else [offload.borders])
            for count in ([blocks.num_blocks] if blocks.num_blocks != "auto" else [1] if tier == "device" else range(2, num_layers + 1))
        )
    else:
        counts = range(1, num_layers + 1) if blocks.num_blocks == "auto" else [blocks.num_blocks]
        order = ((count, tier, recompute, tiers[0]) for count, tier, recompute in itertools.product(counts, resting, recomputes))
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
    """8-bit state costs no time on CUDA and much on a CPU, where torch's fused fp32 kernel is some 40 times faster."""
    if recipe.optimizer.name != "auto":
        return recipe.optimizer.name
    return "adamw8bit" if profile.device.type == "cuda" else "adamw"


def _during_backward(recipe: Recipe, micro_batch_size: int, streams_whole: bool) -> bool:
    """Wherever no gradient has to wait for another: it saves their memory and changes no bit."""
    allowed = recipe.optimizer.grad_clip is None and micro_batch_size == recipe.train.batch_size and not streams_whole
    return allowed and recipe.optimizer.during_backward is not False


def _write_back(recipe: Recipe, streams_whole: bool, layouts: list[ArenaLayout], shared: ArenaLayout) -> Literal["beside", "wait"]:
    if recipe.method == "end_to_end" and not streams_whole:
        return "wait"  # the next step would change what is being written
    if recipe.offload.write_back != "auto":
        return recipe.offload.write_back
    if streams_whole:
        return "beside"  # the next step begins with a forward pass, which changes nothing
    return "beside" if max(layout.total_bytes for layout in layouts) + shared.total_bytes > WRITE_BESIDE_BYTES else "wait"


def _choices(recipe: Recipe, profile: Profile, settings: Settings, noise: NoiseConfig) -> list[str]:
    lines = []
    if recipe.noise.schedule != "lognormal":
        lines.append(f"noise.schedule {recipe.noise.schedule}: ln sigma ~ N({noise.p_mean:.2f}, {noise.p_std:.2f}), measured from the targets")
    if recipe.blocks.num_blocks == "auto":
        lines.append(f"blocks.num_blocks {settings.num_blocks}: the fewest that fit")
    if recipe.train.micro_batch_size == "auto":
        lines.append(f"train.micro_batch_size {settings.micro_batch_size}: the largest that fits, of batch {recipe.train.batch_size}")
    if recipe.train.recompute == "auto":
        lines.append(f"train.recompute {str(settings.recompute).lower()}: " + ("needed to fit" if settings.recompute else "fits without"))
    if recipe.train.precision == "auto":
        lines.append(f"train.precision {settings.precision}: the profile computes in {profile.device.compute_dtype}")
    if recipe.optimizer.name == "auto":
        why = "8-bit state costs no time on CUDA" if settings.optimizer == "adamw8bit" else "on a CPU 8-bit state costs much time"
        lines.append(f"optimizer.name {settings.optimizer}: {why}")
    if recipe.optimizer.during_backward == "auto" and settings.during_backward:
        lines.append("optimizer.during_backward true: no clipping and one micro-batch; gradients alive are counted with the activations")
    if recipe.offload.tier == "auto":
        why = "every block fits on the device" if settings.tier == "device" else "the first that fits"
        if recipe.method == "end_to_end" and settings.tier != "device":
            why = "all blocks do not fit on the device at once, so they stream, one at a time, and every step is as exact"
        lines.append(f"offload.tier {settings.tier}: {why}")
        if recipe.method == "end_to_end" and settings.tier != "device" and recipe.offload.borders == "auto":
            lines.append(f"offload.borders {settings.borders}: the fastest that fits, for activations at block borders")
    if recipe.optimizer.clips_whole and settings.tier != "device":
        lines.append("optimizer.clip global: the norm needs a backward pass of its own, so a step takes 7/4 of the operations that clip block takes")
    return lines


def _excess(plan: Plan) -> tuple[int, int]:
    over_device = max(plan.predicted.device_peak_bytes - plan.budget.device_bytes, 0)
    return over_device + max(plan.predicted.host_peak_bytes - plan.budget.host_bytes, 0), plan.predicted.disk_bytes


def _advice(plan: Plan) -> str:
    predicted, budget, settings, profile = plan.predicted, plan.budget, plan.settings, plan.profile
    spec: DeviceSpec | HostSpec
    if predicted.device_peak_bytes > budget.device_bytes:
        pool, need, allowed, parts, spec = "device", predicted.device_peak_bytes, budget.device_bytes, predicted.by_category, profile.device
    elif predicted.host_peak_bytes > budget.host_bytes:
        pool, need, allowed, parts, spec = "host", predicted.host_peak_bytes, budget.host_bytes, predicted.host_by_category, profile.host
    else:
        return (
            f"plan: the run folder needs {format_bytes(predicted.disk_bytes)} of disk; "
            f"{format_bytes(budget.disk_bytes or 0)} are free after the reserve. Free space, or give another --run-dir."
        )
    largest = max(parts, key=lambda name: parts[name])
    cures, together = [], plan.recipe.method == "end_to_end" and settings.tier == "device"
    if together and plan.recipe.offload.tier == "device":
        cures.append("offload.tier: auto")
    if plan.recipe.method == "end_to_end":
        cures.append("method: diffusion_blocks")
    if not together and settings.num_blocks < getattr(plan.recipe.model, "num_layers", settings.num_blocks + 1) and largest != "runtime_floor":
        cures.append(f"blocks.num_blocks: {min(2 * settings.num_blocks, getattr(plan.recipe.model, 'num_layers', 2 * settings.num_blocks))}")
    if largest == "activations" and not settings.recompute:
        cures.append("train.recompute: true")
    if largest == "activations" and settings.micro_batch_size > 1 and plan.recipe.optimizer.during_backward is not True:
        cures.append(f"train.micro_batch_size: {settings.micro_batch_size // 2}")
    if largest == "borders" and settings.borders != "disk":
        cures.append("offload.borders: disk")
    if settings.tier != "disk" and not together and largest in ("weights", "optimizer_state", "blocks"):
        cures.append("offload.tier: disk")
    if settings.optimizer != "adamw8bit" and largest == "optimizer_state":
        cures.append("optimizer.name: adamw8bit")
    if settings.weights == "float32" and settings.precision == "bfloat16" and largest in ("weights", "shared_part", "staging", "blocks"):
        cures.append("train.weights: bfloat16")
    if 4 * parts.get("gradients", 0) >= parts[largest] and (together or plan.recipe.method != "end_to_end"):
        cures.append("optimizer.grad_clip: null (with one micro-batch updates then run during backward, and no gradients gather)")
    if largest == "staging" and plan.recipe.offload.prefetch:
        cures.append("offload.prefetch: false")
    block = max(range(settings.num_blocks), key=lambda b: predicted.block_peak_bytes[b])
    who = "the run" if together else f"block {block} of {settings.num_blocks}"
    return (
        f"plan: {who} needs {format_bytes(need)} on the {pool} at micro_batch_size {settings.micro_batch_size}; profile {profile.name} "
        f"allows {format_bytes(allowed)} ({spec.memory_gib:.2f} - {spec.reserve_gib:.2f} GiB reserve). "
        f"Largest part: {largest.replace('_', ' ')} {format_bytes(parts[largest])}. Try {', or '.join(cures) or 'a profile with more memory'}."
    )


def _bar(used: int, allowed: int | None) -> str:
    if allowed is None:
        return f"{format_bytes(used):>10}"
    filled = min(round(20 * used / max(allowed, 1)), 20)
    return f"{format_bytes(used):>10} of {format_bytes(allowed):>10}  [{'#' * filled}{'.' * (20 - filled)}]{'  OVER' if used > allowed else ''}"


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
