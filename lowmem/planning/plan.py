"""Plans a run before it starts: what it will take, whether the machine allows that, and what `auto` becomes.

`make_plan` goes through the candidate settings and takes the first that fits the budget. The plan is frozen
in the run folder; later processes of the run read it back.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from lowmem.blocks.order import BlockQueue
from lowmem.blocks.run_dir import RunDir
from lowmem.blocks.unit import CHUNK_NUMEL
from lowmem.data.identity import DataIdentity
from lowmem.errors import BudgetError, ConfigError, ResumeError, StoreError
from lowmem.machine.child import in_child
from lowmem.machine.profile import Profile
from lowmem.models.base import BlockModel, BuildModel, check_model, num_weights
from lowmem.planning.advice import Shortage, advice_for
from lowmem.planning.candidates import candidates_of, choices_of, settled
from lowmem.planning.duration import Duration
from lowmem.planning.evaluation import Evaluation, plan_evaluation
from lowmem.planning.footprint import Budget, Predicted, predict, with_headroom, without_headroom
from lowmem.planning.passes import PassCounter
from lowmem.planning.settings import Settings, Setup, is_resident, setup_of
from lowmem.planning.traffic import traffic_lines
from lowmem.recipe import NoiseConfig, Recipe
from lowmem.reporting.tables import as_html, text_table
from lowmem.schema import Section, parse
from lowmem.units import GIB, arithmetic_text, format_bytes, format_seconds, from_gib

COLUMN = 25  # characters of one plan in a table of several
BAR = 20  # characters
TIGHT = 0.9  # of a budget: what is taken without activations where they will hardly have room
# How much larger than usual the chunks of an update may be, and the fewest of them in the largest unit.
CHUNK_TIMES, CHUNKS_OF_UNIT = (4, 2), 6
OFF_LINE = 0.02  # of a budget: how far a peak may lie beside the line between two others
# What of the settings changes no arena: how they pass, and where they rest.
NO_PLACE = {
    "resident_layers": 0,
    "resident_weights": 0,
    "micro_batch_size": 1,
    "recompute": False,
    "during_backward": False,
    "tier": "device",
    "borders": "device",
    "shared": "device",
    "write_back": "wait",
}
FREE_KEYS = ("recipe.train.on_oom",)  # may differ from one process of a run to the next


class Plan(Section):
    """A recipe on a machine: settled settings, and what they are predicted to take. Frozen as plan.json."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    recipe: Recipe
    profile: Profile
    noise: NoiseConfig  # the recipe's, with what its schedule measures from the targets
    settings: Settings
    budget: Budget
    predicted: Predicted
    num_parameters: int
    choices: list[str]  # what was `auto`, what it became, and why
    model_source: str | None = None  # see `ModelConfig.fingerprint`
    data: DataIdentity | None = None  # known once the run begins; None: batches that Python gives

    @property
    def fits(self) -> bool:
        return self.predicted.fits(self.budget)

    def require_fit(self) -> None:
        """Raises BudgetError if the plan does not fit: its table, the largest part, and what to change."""
        if not self.fits:
            shortage = Shortage(self.recipe, self.profile, self.settings, self.budget, self.predicted)
            raise BudgetError(advice_for(shortage), self.table())

    def queue(self) -> BlockQueue:
        """The order of the run's visits."""
        return BlockQueue.of(self.recipe.to_dict(), self.settings.num_blocks)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plan.json and `lowmem plan --json` have it."""
        return {**self.model_dump(mode="json", by_alias=True), "fits": self.fits}

    @property
    def title(self) -> str:
        millions = self.num_parameters / 1e6
        return f"plan: {self.recipe.method}, {self.recipe.model.name}, {millions:.2f} million parameters"

    def _repr_html_(self) -> str:
        return as_html(self.table())

    def table(self) -> str:
        """The plan as text: categories with their shares, then the budgets, settings, traffic and time."""
        budget, predicted = self.budget, self.predicted
        peak = predicted.device_peak_bytes
        rows = [
            (name.replace("_", " "), format_bytes(num_bytes), f"{num_bytes / peak:.0%}")
            for name, num_bytes in predicted.by_category.items()
        ]
        rows.append(
            ("device peak", format_bytes(peak), f"{peak / max(budget.device_bytes, 1):.0%} of budget")
        )
        return text_table(self.title, ("device memory", "predicted", "share"), rows, self._notes())

    def _notes(self) -> list[str]:
        budget, predicted, profile = self.budget, self.predicted, self.profile
        grown = self.queue().grow_steps
        headroom = format_bytes(with_headroom(predicted.run_peak_bytes) - predicted.run_peak_bytes)
        same = "   (the same memory as the device)" if profile.unified else ""
        no_time = (
            f"time: unknown, profile {profile.name} lacks device.peak_tflops or memory_gib_per_s: "
            "`lowmem detect --measure` finds them"
        )
        return [
            f"device  {_bar(predicted.device_peak_bytes, budget.device_bytes)}"
            f"   ({profile.device.type}, {profile.name})",
            f"host    {_bar(predicted.host_peak_bytes, budget.host_bytes)}{same}",
            f"disk    {_bar(predicted.disk_bytes, budget.disk_bytes)}",
            f"settings: {_settings_text(self)}",
            *([f"grows: block 0 alone for {grown} steps, then copied to all"] if grown else []),
            *(traffic_lines(predicted.traffic) if predicted.traffic else []),
            *(predicted.time.lines() if predicted.time else [no_time]),
            *([predicted.evaluation.line()] if predicted.evaluation else []),
            *(f"chosen: {choice}" for choice in self.choices if self.fits),
            f"{'fits' if self.fits else 'DOES NOT FIT'} with {headroom} of headroom, "
            "for what a prediction may be off by",
        ]


def _arithmetic(plan: Plan) -> str:
    train, optimizer = plan.recipe.train, plan.recipe.optimizer
    return arithmetic_text(plan.settings.precision, optimizer.loss_scale, train.fp16_accumulation)


def _settings_text(plan: Plan) -> str:
    settings, sweep_steps = plan.settings, plan.recipe.blocks.sweep_steps
    pieces = "layers" if sweep_steps == 1 else "blocks"
    return ", ".join(
        [
            f"{settings.num_blocks} blocks",
            f"tier {settings.tier}",
            *([f"sweeps of {sweep_steps} steps"] if sweep_steps > 1 else []),
            f"micro-batch {settings.micro_batch_size}",
            _arithmetic(plan),
            f"weights {settings.weights}",
            settings.optimizer,
            f"recompute {'on' if settings.recompute else 'off'}",
            *([f"{settings.resident_layers} {pieces} stay"] if settings.resident_layers else []),
            *(
                [f"the weights of {settings.resident_weights} layers stay"]
                if settings.resident_weights
                else []
            ),
            *(["shared part's moments rest there"] if settings.shared == "tier" else []),
            *([f"updates {settings.update_chunk:,} weights at once"] if settings.update_chunk else []),
            f"updates {'during' if settings.during_backward else 'after'} backward",
            f"write-back {settings.write_back}",
        ]
    )


def _bar(used: int, allowed: int | None) -> str:
    """Used bytes, and a bar of them against what is allowed (None: unknown)."""
    if allowed is None:
        return f"{format_bytes(used):>10}"
    filled = min(round(BAR * used / max(allowed, 1)), BAR)
    over = "  OVER" if used > allowed else ""
    bar = "#" * filled + "." * (BAR - filled)
    return f"{format_bytes(used):>10} of {format_bytes(allowed):>10}  [{bar}]{over}"


# ------------------------------------------------------------------------------------------------------------
# Making a plan


def make_plan(
    build_model: BuildModel,
    recipe: Recipe,
    profile: Profile,
    folder: Path | None = None,
    data_bytes: int = 0,
    num_test: int | None = None,
) -> Plan:
    """The plan of a recipe on a machine: the first candidate that fits, or, with `fits` false, the smallest.

    The best candidates have the fewest blocks, then the fastest tier, no recompute, the largest micro-batch.
    `folder`: where the run will be, whose free space is the disk's budget; None: unknown. `data_bytes`: what
    the data hold in host memory; `num_test`: samples of their test part, if known. The model is built on
    the meta device, so nothing is allocated. Raises ConfigError for a model or settings that cannot be
    trained.
    """
    return in_child(lambda: _made_plan(build_model, recipe, profile, folder, data_bytes, num_test))


def _made_plan(
    build_model: BuildModel,
    recipe: Recipe,
    profile: Profile,
    folder: Path | None,
    data_bytes: int,
    num_test: int | None,
) -> Plan:
    with torch.device("meta"):
        model = build_model()
        objective = model.make_objective(recipe.noise)
    check_model(model)
    noise = objective.noise
    counter = PassCounter(model, objective, recipe, in_heap=profile.device.type == "cpu")
    budget = _budget(profile, folder)
    source = recipe.model.fingerprint()
    num_parameters = num_weights(model, model.named_parameters())

    setups = dict[Settings, Setup]()  # candidates mostly differ in where the same arenas rest

    def planned(settings: Settings, counted: bool = True) -> Plan:
        layout = settings.model_copy(update=NO_PLACE)
        if layout not in setups:
            setups[layout] = setup_of(model, recipe, profile, settings)
        setup = settled(replace(setups[layout], settings=settings))
        return Plan(
            recipe=recipe,
            profile=profile,
            noise=noise,
            settings=setup.settings,
            budget=budget,
            predicted=predict(model, setup, counter if counted else None, data_bytes),
            num_parameters=num_parameters,
            choices=choices_of(recipe, profile, setup.settings, noise),
            model_source=source,
        )

    plan = _first_that_fits(candidates_of(recipe, profile, model.most_blocks), planned)
    swept = recipe.blocks.sweep_steps > 1
    num_pieces = plan.settings.num_blocks if swept else len(model.units())
    setup = replace(setups[plan.settings.model_copy(update=NO_PLACE)], settings=plan.settings)
    if plan.settings.resident_weights and setup.streams and not setup.in_place:
        raise ConfigError(
            f"offload.resident_weights: found {plan.settings.resident_weights}; allowed where layers are "
            "updated in place: without sweeps and adapters, and with blocks of one layer or "
            "optimizer.grad_clip null; leave it out"
        )
    plan = _with_larger_chunks(plan, setup, planned)
    plan = _with_more_staying(plan, num_pieces, setup.in_place, planned)
    if plan.settings.update_chunk and not replace(setup, settings=plan.settings).unit_bytes.chunks:
        settings = plan.settings.model_copy(update={"update_chunk": None})  # no update moves anything
        plan = plan.model_copy(update={"settings": settings})
    if not plan.fits:
        return plan
    evaluation = _evaluation_of(plan, model, counter, num_test)
    predicted = plan.predicted.model_copy(update={"evaluation": evaluation})
    return plan.model_copy(update={"predicted": predicted})


def evaluation_of(plan: Plan, build_model: BuildModel, num_test: int | None) -> Evaluation | None:
    """The evaluation of a plan, cut for so many test samples; None for an objective that has none."""
    return in_child(lambda: _counted_evaluation(plan, build_model, num_test))


def _counted_evaluation(plan: Plan, build_model: BuildModel, num_test: int | None) -> Evaluation | None:
    with torch.device("meta"):
        model = build_model()
        objective = model.make_objective(plan.noise)
    counter = PassCounter(model, objective, plan.recipe, in_heap=plan.profile.device.type == "cpu")
    return _evaluation_of(plan, model, counter, num_test)


def _evaluation_of(
    plan: Plan, model: BlockModel, counter: PassCounter, num_test: int | None
) -> Evaluation | None:
    setup = setup_of(model, plan.recipe, plan.profile, plan.settings)
    allowed = without_headroom(plan.budget.device_bytes)
    return plan_evaluation(model, setup, counter, plan.predicted.by_category, allowed, num_test)


def _budget(profile: Profile, folder: Path | None) -> Budget:
    disk_bytes = None
    if folder is not None:
        disk_bytes = max(_free_bytes(folder) - from_gib(profile.disk.reserve_gib), 0)
    return Budget(
        device_bytes=profile.device_budget_bytes,
        host_bytes=profile.host_budget_bytes,
        disk_bytes=disk_bytes,
    )


def _free_bytes(folder: Path) -> int:
    """Free bytes of the disk on which a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _first_that_fits(candidates: Iterable[list[Settings]], planned: Callable[..., Plan]) -> Plan:
    """The plan of the first candidate that fits, else the one that exceeds its budget least.

    `planned(settings, counted)` plans one candidate; without counting it takes no time and gives a lower
    bound. So passes are counted only where that bound fits.
    """
    refused: list[tuple[Plan, bool]] = []  # of each list the best plan, and whether its passes were counted
    for sizes in candidates:
        plan = planned(sizes[-1], counted=False)
        counted = plan.fits
        if counted:
            tight = plan.predicted.device_needed_bytes > TIGHT * plan.budget.device_bytes
            plan = _largest_that_fits(sizes, planned, tight)
            if plan.fits:
                return plan
        refused.append((plan, counted))
    # Of equal bounds the last is the leanest, because what was not counted makes no difference in them.
    plan, counted = min(reversed(refused), key=lambda pair: _excess(pair[0]))
    return plan if counted else planned(plan.settings)


def _with_larger_chunks(plan: Plan, setup: Setup, planned: Callable[[Settings], Plan]) -> Plan:
    """The plan with the largest chunks of an update that its budget has room for, where units are updated
    one after another on a CPU: fewer and larger requests to the disk. That costs little memory, because a
    chunk is at most a sixth of a unit.
    """
    if not (setup.by_unit and plan.fits) or setup.frozen or setup.profile.device.type != "cpu":
        return plan
    usual = CHUNK_NUMEL["cpu"]
    largest = max(unit.numel for unit in setup.units)
    for chunk in (times * usual for times in CHUNK_TIMES if times * usual <= largest // CHUNKS_OF_UNIT):
        more = planned(plan.settings.model_copy(update={"update_chunk": chunk}))
        if more.fits:
            return more
    return plan


def _with_more_staying(
    plan: Plan, num_pieces: int, in_place: bool, planned: Callable[[Settings], Plan]
) -> Plan:
    """The plan with as many units, or blocks in sweeps, on the device as the budget has room for, where the
    others stream.

    `in_place`: units are updated in place. Then weights stay first, of all units, because a step reads them
    twice and writes them, and reads and writes moments once.
    """
    recipe, settings = plan.recipe, plan.settings
    streams = recipe.method == "end_to_end" and not is_resident(settings, plan.profile.unified)
    offload = recipe.offload
    if not (streams and plan.fits and offload.resident_layers == "auto"):
        return plan

    def most(plan: Plan, of: Callable[[int], dict[str, int]]) -> tuple[Plan, int]:
        """The plan with the largest count that fits, and the count. `of`: what a count sets."""
        least, last = 0, num_pieces
        while least < last:
            count = (least + last + 1) // 2
            more = planned(settings.model_copy(update=of(count)))
            if more.fits:
                plan, least = more, count
            else:
                last = count - 1
        return plan, least

    rest = settings.resident_weights
    if in_place and offload.resident_weights == "auto":
        plan, rest = most(plan, lambda count: {"resident_weights": count})
        if rest < num_pieces:
            return plan
    plan, _ = most(plan, lambda count: {"resident_layers": count, "resident_weights": max(rest - count, 0)})
    return plan


def _largest_that_fits(
    candidates: list[Settings], planned: Callable[[Settings], Plan], tight: bool = False
) -> Plan:
    """The plan of the first candidate that fits; where none fits, of the last.

    The candidates differ in the micro-batch alone, largest first. Planning one takes up to two seconds. So
    both ends are planned, and of those between only the ones that may fit if the peak grows about in
    proportion to the micro-batch. `tight`: hardly anything is left for activations, so the smallest is
    planned first, and where it does not fit no other.
    """
    smallest = planned(candidates[-1]) if tight else None
    if smallest is not None and not smallest.fits:
        return smallest
    largest = planned(candidates[0])
    if largest.fits or len(candidates) == 1:
        return largest
    smallest = smallest or planned(candidates[-1])
    if not smallest.fits:
        return smallest
    first, last = smallest.settings.micro_batch_size, largest.settings.micro_batch_size
    at_first, at_last = (with_headroom(plan.predicted.run_peak_bytes) for plan in (smallest, largest))
    for settings in candidates[1:-1]:
        share = (settings.micro_batch_size - first) / (last - first)
        about = at_first + share * (at_last - at_first)
        if about <= (1 + OFF_LINE) * largest.budget.device_bytes and (plan := planned(settings)).fits:
            return plan
    return smallest


def _excess(plan: Plan) -> tuple[int, int]:
    """(bytes of memory beyond the budget, bytes on the disk): the plan with the least is shown."""
    over_device = max(plan.predicted.device_needed_bytes - plan.budget.device_bytes, 0)
    over_host = max(plan.predicted.host_needed_bytes - plan.budget.host_bytes, 0)
    return over_device + over_host, plan.predicted.disk_bytes


# ------------------------------------------------------------------------------------------------------------
# Several plans side by side


def plans_table(plans: Sequence[Plan]) -> str:
    """Plans of one recipe on several machines, one column each."""
    per = "samples/s" if plans[0].recipe.train.seq_len is None else "tokens/s"
    names = [
        "fits",
        "device peak",
        "host peak",
        "disk",
        "blocks, tier",
        "micro-batch, recompute",
        "precision, optimizer",
        "step",
        per,
        "waiting for blocks",
        "run",
    ]
    rows = list(zip(names, *map(_column, plans), strict=True))
    columns = ("", *(plan.profile.name for plan in plans))
    return text_table(plans[0].title, columns, rows, width=COLUMN * (len(plans) + 1))


def _column(plan: Plan) -> list[str]:
    predicted, settings, budget = plan.predicted, plan.settings, plan.budget
    return [
        "yes" if plan.fits else "NO",
        f"{predicted.device_peak_bytes / GIB:.2f} of {budget.device_bytes / GIB:.2f} GiB",
        f"{predicted.host_peak_bytes / GIB:.2f} of {budget.host_bytes / GIB:.2f} GiB",
        format_bytes(predicted.disk_bytes),
        f"{settings.num_blocks}, {settings.tier}",
        f"{settings.micro_batch_size}, {'on' if settings.recompute else 'off'}",
        f"{_arithmetic(plan)}, {settings.optimizer}",
        *_time_cells(predicted.time),
    ]


def _time_cells(time: Duration | None) -> list[str]:
    if time is None:
        return ["unknown"] * 4
    rate = time.samples_per_s if time.tokens_per_s is None else time.tokens_per_s
    return [
        format_seconds(time.step_s),
        f"{rate:,.0f}",
        f"{time.exposed_s / max(time.visit_s, 1e-9):.0%}",
        format_seconds(time.run_s),
    ]


# ------------------------------------------------------------------------------------------------------------
# The frozen plan of a run folder


def read_plan(run: RunDir) -> Plan:
    """The frozen plan. A key that it was made without gets its default. Raises ResumeError, StoreError."""
    raw = {key: value for key, value in run.read_plan().items() if key != "fits"}
    return parse(Plan, raw, str(run.plan_path), StoreError)


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
