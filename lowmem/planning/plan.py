"""The budget before the run: what it will take against what the profile allows, and the choice of whatever is
`auto`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from lowmem.blocks.order import BlockQueue
from lowmem.blocks.run_dir import RunDir
from lowmem.errors import BudgetError, ResumeError, StoreError
from lowmem.machine.profile import DeviceSpec, HostSpec, Profile
from lowmem.models.base import BuildModel, check_model
from lowmem.planning.candidates import candidates_of, choices_of, during_backward, write_back
from lowmem.planning.footprint import Predicted, predict, with_headroom
from lowmem.planning.passes import PassCounter
from lowmem.planning.settings import Settings, is_resident, layouts_of
from lowmem.planning.traffic import traffic_lines
from lowmem.recipe import NoiseConfig, Recipe
from lowmem.reporting.tables import text_table
from lowmem.schema import Section, parse
from lowmem.units import GIB, format_bytes, format_seconds, from_gib

COLUMN = 25  # characters of a plan among several
NO_TIME = "time: unknown, profile {profile} lacks device.peak_tflops or memory_gib_per_s: `lowmem detect --measure` finds them"


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
            self.predicted.device_needed_bytes <= self.budget.device_bytes
            and self.predicted.host_needed_bytes <= self.budget.host_bytes
            and (disk is None or self.predicted.disk_bytes <= disk)
        )

    def require_fit(self) -> None:
        """Raises BudgetError, with the table, naming the largest part and what to change."""
        if not self.fits:
            raise BudgetError(_advice(self), self.table())

    def queue(self) -> BlockQueue:
        return BlockQueue.of(self.recipe.to_dict(), self.settings.num_blocks)

    def to_dict(self) -> dict[str, Any]:
        return {**self.model_dump(mode="json", by_alias=True), "fits": self.fits}

    @property
    def title(self) -> str:
        return f"plan: {self.recipe.method}, {self.recipe.model.name}, {self.num_parameters / 1e6:.2f} million parameters"

    def table(self) -> str:
        budget, predicted = self.budget, self.predicted
        rows = [
            (
                name.replace("_", " "),
                format_bytes(num_bytes),
                f"{num_bytes / predicted.device_peak_bytes:.0%}",
            )
            for name, num_bytes in predicted.by_category.items()
        ]
        rows.append(
            (
                "device peak",
                format_bytes(predicted.device_peak_bytes),
                f"{predicted.device_peak_bytes / budget.device_bytes:.0%} of budget",
            )
        )
        headroom = predicted.device_needed_bytes - predicted.device_peak_bytes
        settings = self.settings
        notes = [
            f"device  {_bar(predicted.device_peak_bytes, budget.device_bytes)}   ({self.profile.device.type}, {self.profile.name})",
            f"host    {_bar(predicted.host_peak_bytes, budget.host_bytes)}"
            + ("   (the same memory as the device)" if self.profile.unified else ""),
            f"disk    {_bar(predicted.disk_bytes, budget.disk_bytes)}",
            f"settings: {settings.num_blocks} blocks, tier {settings.tier}, micro-batch {settings.micro_batch_size}, {settings.precision}, "
            f"weights {settings.weights}, {settings.optimizer}, recompute {'on' if settings.recompute else 'off'}, "
            f"updates {'during' if settings.during_backward else 'after'} backward, write-back {settings.write_back}",
            *(traffic_lines(predicted.traffic) if predicted.traffic else []),
            *(predicted.time.lines() if predicted.time else [NO_TIME.format(profile=self.profile.name)]),
            *(f"chosen: {choice}" for choice in self.choices if self.fits),
            f"{'fits' if self.fits else 'DOES NOT FIT'} with {format_bytes(headroom)} of headroom, for what a prediction may be off by",
        ]
        return text_table(self.title, ("device memory", "predicted", "share"), rows, notes)


def make_plan(
    build_model: BuildModel, recipe: Recipe, profile: Profile, folder: Path | None = None, data_bytes: int = 0
) -> Plan:
    """The first candidate that fits: fewest blocks, then the fastest tier, no recompute, the largest
    micro-batch.

    If none fits, the smallest candidate, with `fits` false. `folder`: where the run will be (its disk's free
    space is the disk budget); None: unknown. `data_bytes`: what the data hold in host memory. Nothing is
    allocated: the model is built on the meta device.
    """
    with torch.device("meta"):
        model = build_model()
        objective = model.make_objective(recipe.noise)
    check_model(model)
    noise = objective.noise
    counter = PassCounter(model, objective, recipe, in_heap=profile.device.type == "cpu")
    budget = Budget(
        device_bytes=profile.device_budget_bytes,
        host_bytes=profile.host_budget_bytes,
        disk_bytes=None
        if folder is None
        else max(_free_bytes(folder) - from_gib(profile.disk.reserve_gib), 0),
    )

    def planned(settings: Settings, counted: bool = True) -> Plan:
        streams_whole = recipe.method == "end_to_end" and not is_resident(settings, profile.unified)
        settings = settings.model_copy(
            update={
                "write_back": write_back(recipe, streams_whole, *layouts_of(model, settings)),
                "during_backward": during_backward(recipe, settings.micro_batch_size, streams_whole),
            }
        )
        return Plan(
            recipe=recipe,
            profile=profile,
            noise=noise,
            settings=settings,
            budget=budget,
            predicted=predict(model, recipe, profile, settings, counter if counted else None, data_bytes),
            num_parameters=sum(p.numel() for p in model.parameters()),
            choices=choices_of(recipe, profile, settings, noise),
        )

    refused: list[
        tuple[Plan, bool]
    ] = []  # of each list of candidates one plan, and whether it was counted in full
    for candidates in candidates_of(recipe, profile, len(model.layers)):
        plan = planned(
            candidates[-1], counted=False
        )  # takes no time; a pass has to be counted only where this fits
        counted = plan.fits
        if counted:
            plan = _largest_that_fits(candidates, planned)
            if plan.fits:
                return plan
        refused.append((plan, counted))
    plan, counted = min(refused, key=lambda pair: _excess(pair[0]))
    return plan if counted else planned(plan.settings)


def plans_table(plans: Sequence[Plan]) -> str:
    """The same recipe on several machines, one beside the other."""

    def column(plan: Plan) -> list[str]:
        predicted, settings, budget, time = plan.predicted, plan.settings, plan.budget, plan.predicted.time
        rate = (
            None if time is None else time.samples_per_s if time.tokens_per_s is None else time.tokens_per_s
        )
        return [
            "yes" if plan.fits else "NO",
            f"{predicted.device_peak_bytes / GIB:.2f} of {budget.device_bytes / GIB:.2f} GiB",
            f"{predicted.host_peak_bytes / GIB:.2f} of {budget.host_bytes / GIB:.2f} GiB",
            format_bytes(predicted.disk_bytes),
            f"{settings.num_blocks}, {settings.tier}",
            f"{settings.micro_batch_size}, {'on' if settings.recompute else 'off'}",
            f"{settings.precision}, {settings.optimizer}",
            *(
                ["unknown"] * 4
                if time is None or rate is None
                else [
                    format_seconds(time.step_s),
                    f"{rate:,.0f}",
                    f"{time.exposed_s / max(time.visit_s, 1e-9):.0%}",
                    format_seconds(time.run_s),
                ]
            ),
        ]

    per = "samples/s" if plans[0].recipe.train.seq_len is None else "tokens/s"
    names = [
        "fits",
        "device peak",
        "host peak",
        "disk",
        "blocks, tier",
        "micro-batch, recompute",
        "precision, optimizer",
    ]
    names += ["step", per, "waiting for blocks", "run"]
    rows = list(zip(names, *map(column, plans), strict=True))
    return text_table(
        plans[0].title, ("", *(plan.profile.name for plan in plans)), rows, width=COLUMN * (len(plans) + 1)
    )


def read_plan(run: RunDir) -> Plan:
    """The frozen plan of a run folder.

    A key that it was made without has its default. Raises ResumeError, StoreError.
    """
    raw = {key: value for key, value in run.read_plan().items() if key != "fits"}
    return parse(Plan, raw, str(run.plan_path), StoreError)


# ------------------------------------------------------------------------------------------------------------
# Choosing


def _largest_that_fits(candidates: list[Settings], planned: Callable[[Settings], Plan]) -> Plan:
    """Of candidates that differ in the micro-batch alone, largest first; where none fits, the smallest.

    To plan one takes up to a second or two. Activations grow about in proportion to the micro-batch, so the
    search begins where that leads, and few are looked at.
    """
    plan = planned(candidates[0])
    if plan.fits or len(candidates) == 1:
        return plan
    activations = plan.predicted.by_category["activations"]
    room = plan.budget.device_bytes - (plan.predicted.device_needed_bytes - activations)
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


def _excess(plan: Plan) -> tuple[int, int]:
    over_device = max(plan.predicted.device_needed_bytes - plan.budget.device_bytes, 0)
    return over_device + max(
        plan.predicted.host_needed_bytes - plan.budget.host_bytes, 0
    ), plan.predicted.disk_bytes


def _advice(plan: Plan) -> str:
    predicted, budget, settings, profile = plan.predicted, plan.budget, plan.settings, plan.profile
    spec: DeviceSpec | HostSpec
    if predicted.device_needed_bytes > budget.device_bytes:
        pool, need, allowed, parts, spec = (
            "device",
            predicted.device_peak_bytes,
            budget.device_bytes,
            predicted.by_category,
            profile.device,
        )
    elif predicted.host_needed_bytes > budget.host_bytes:
        pool, need, allowed, parts, spec = (
            "host",
            predicted.host_peak_bytes,
            budget.host_bytes,
            predicted.host_by_category,
            profile.host,
        )
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
    if (
        not together
        and settings.num_blocks < getattr(plan.recipe.model, "num_layers", settings.num_blocks + 1)
        and largest != "runtime_floor"
    ):
        cures.append(
            f"blocks.num_blocks: {min(2 * settings.num_blocks, getattr(plan.recipe.model, 'num_layers', 2 * settings.num_blocks))}"
        )
    if largest == "activations" and not settings.recompute:
        cures.append("train.recompute: true")
    if (
        largest == "activations"
        and settings.micro_batch_size > 1
        and plan.recipe.optimizer.during_backward is not True
    ):
        cures.append(f"train.micro_batch_size: {settings.micro_batch_size // 2}")
    if largest == "borders" and settings.borders != "disk":
        cures.append("offload.borders: disk")
    if settings.tier != "disk" and not together and largest in ("weights", "optimizer_state", "blocks"):
        cures.append("offload.tier: disk")
    if settings.optimizer != "adamw8bit" and largest == "optimizer_state":
        cures.append("optimizer.name: adamw8bit")
    if (
        settings.weights == "float32"
        and settings.precision == "bfloat16"
        and largest in ("weights", "shared_part", "staging", "blocks")
    ):
        cures.append("train.weights: bfloat16")
    if 4 * parts.get("gradients", 0) >= parts[largest] and (together or plan.recipe.method != "end_to_end"):
        cures.append(
            "optimizer.grad_clip: null (with one micro-batch updates then run during backward, and no gradients gather)"
        )
    if largest == "staging" and plan.recipe.offload.prefetch:
        cures.append("offload.prefetch: false")
    block = max(range(settings.num_blocks), key=lambda b: predicted.block_peak_bytes[b])
    who = "the run" if together else f"block {block} of {settings.num_blocks}"
    return (
        f"plan: {who} needs {format_bytes(need)} on the {pool}, and {format_bytes(with_headroom(need) - need)} of headroom, at micro_batch_size "
        f"{settings.micro_batch_size}; profile {profile.name} allows {format_bytes(allowed)} ({spec.memory_gib:.2f} - {spec.reserve_gib:.2f} GiB "
        f"reserve). Largest part: {largest.replace('_', ' ')} {format_bytes(parts[largest])}. "
        f"Try {', or '.join(cures) or 'a profile with more memory'}."
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


FREE_KEYS = ("recipe.train.on_oom",)  # may differ from one process of a run to the next


def check_continues(folder: Path, frozen: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Checks that the run in `folder`, made with `frozen`, may go on with `given`.

    Both are nested dictionaries: recipe, profile and whatever else must stay the same. Raises ResumeError,
    which names the first key that differs and both values.
    """
    difference = first_difference(frozen, given)
    if difference:
        key, was, now = difference
        raise ResumeError(
            f"run folder {folder}: made with {key} = {was}, now {now}; "
            "use the same value, or another --run-dir"
        )


def first_difference(frozen: Any, given: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key, dotted, at which two nested mappings differ, with both values. FREE_KEYS may differ."""
    if isinstance(frozen, Mapping) and isinstance(given, Mapping):
        for name in [*frozen, *(name for name in given if name not in frozen)]:
            difference = first_difference(frozen.get(name), given.get(name), f"{key}.{name}" if key else name)
            if difference:
                return difference
        return None
    return None if frozen == given or key in FREE_KEYS else (key, frozen, given)
