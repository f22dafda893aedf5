"""What `plan.json`, `state.json` and each line of the telemetry must hold for a report to be made of them.

A run folder may come from another version of lowmem, or from anywhere. What is wrong in it is said in one
line; a line of telemetry that is wrong is skipped and counted. Keys that no report reads are not looked at.
"""

from __future__ import annotations

import re
import typing
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowmem.blocks.run_dir import RunDir, RunState
from lowmem.blocks.traffic import Traffic
from lowmem.errors import StoreError
from lowmem.machine.profile import Profile
from lowmem.schema import Section, parse
from lowmem.units import counted

Whole = Annotated[int, Field(ge=0, le=2**62)]
Number = Annotated[float, Field(ge=-1e300, le=1e300)]
Plain = Annotated[str, Field(max_length=10_000)]


class Seen(Section):
    """A part of a file of which only some keys are read."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class SeenModel(Seen):
    name: str


class SeenBlocks(Seen):
    visit_steps: Annotated[int, Field(gt=0, le=10**9)]
    sweep_steps: Annotated[int, Field(gt=0, le=256)] = 1
    grow_at: Annotated[float, Field(gt=0, lt=1)] | None = None
    order: str


class SeenTrain(Seen):
    num_steps: Annotated[int, Field(gt=0, le=10**9)]
    batch_size: Annotated[int, Field(gt=0, le=10**9)]
    seed: int
    fp16_accumulation: bool = False


class SeenOptimizer(Seen):
    loss_scale: Annotated[float, Field(ge=1, le=2**15)] = 1.0


class SeenOffload(Seen):
    prefetch: bool


class SeenRecipe(Seen):
    method: typing.Literal["diffusion_blocks", "end_to_end", "block_coordinate"]
    model: SeenModel
    blocks: SeenBlocks
    train: SeenTrain
    optimizer: SeenOptimizer = SeenOptimizer()
    offload: SeenOffload


class SeenSettings(Seen):
    num_blocks: Annotated[int, Field(gt=0, le=4096)]
    micro_batch_size: Whole
    optimizer: str
    precision: str
    tier: str
    recompute: bool
    write_back: str


class SeenBudget(Seen):
    device_bytes: Whole
    host_bytes: Whole
    disk_bytes: Whole | None


class SeenTraffic(Seen):
    start: Traffic
    step: Traffic
    commit: Traffic
    sweep_steps: Annotated[int, Field(gt=0, le=256)] = 1
    before: Traffic = Traffic()
    whole: Traffic | None = None


class SeenTime(Seen):
    run_s: Number
    exposed_s: Number


class SeenEvaluation(Seen):
    peak_bytes: Whole
    seconds: Number | None = None


class SeenPredicted(Seen):
    device_peak_bytes: Annotated[int, Field(gt=0, le=2**62)]
    host_peak_bytes: Annotated[int, Field(gt=0, le=2**62)]
    disk_bytes: Annotated[int, Field(gt=0, le=2**62)]
    by_category: dict[str, Whole]
    host_by_category: dict[str, Whole]
    block_peak_bytes: list[Whole]
    traffic: SeenTraffic | None = None
    time: SeenTime | None = None
    evaluation: SeenEvaluation | None = None


class SeenPlan(Seen):
    """plan.json, as far as reports read it."""

    schema_version: typing.Literal[1] = Field(alias="schema")
    recipe: SeenRecipe
    profile: Profile
    settings: SeenSettings
    budget: SeenBudget
    predicted: SeenPredicted
    num_parameters: Whole

    @model_validator(mode="after")
    def _one_peak_for_each_block(self) -> SeenPlan:
        found, blocks = len(self.predicted.block_peak_bytes), self.settings.num_blocks
        if found != blocks:
            raise ValueError(
                f"predicted.block_peak_bytes: found {counted(found, 'block')}, settings have {blocks}"
            )
        return self


class SeenMetrics(Seen):
    metric: str
    value: Number


BASE = "base"  # the file of frozen weights that are in no block, where an adapter is trained


def read_run(run: RunDir) -> tuple[dict[str, Any], RunState]:
    """plan.json as a dict that holds all that reports read, and the committed state (empty before the first).

    Raises ResumeError if the folder holds no run, StoreError in one line for what no report can be made of.
    """
    plan = run.read_plan()
    _require_schema(plan, SeenPlan, str(run.plan_path))
    seen = parse(SeenPlan, plan, str(run.plan_path), StoreError)
    state = run.read_state() or RunState()
    if state.files or state.blocks:
        _require_blocks(state, seen.settings.num_blocks, str(run.state_path))
    for name, metrics in {"metrics": state.metrics, "first_metrics": state.first_metrics}.items():
        if metrics is not None:
            parse(SeenMetrics, metrics, f"{run.state_path}: {name}", StoreError)
    return plan, state


def _require_schema(raw: dict[str, Any], cls: type[Section], where: str) -> None:
    """Raises StoreError, which names both numbers, for a file of another version."""
    known = typing.get_args(cls.model_fields["schema_version"].annotation)[0]
    found = raw.get("schema")
    if found != known or isinstance(found, bool):
        raise StoreError(
            f"{where}: found schema {found!r}; this lowmem reads schema {known}; use the lowmem that wrote "
            "it, or train again in another --run-dir"
        )


def _require_blocks(state: RunState, num_blocks: int, where: str) -> None:
    numbers = [block.block for block in state.blocks]
    if numbers != list(range(num_blocks)):
        raise StoreError(
            f"{where}: blocks: found {numbers[:20]}; expected 0 to {num_blocks - 1} in order, as plan.json "
            "has; restore it from a copy"
        )
    expected = {"shared", *(f"block-{number}" for number in range(num_blocks))}
    odd = sorted((expected ^ set(state.files)) - {BASE})
    if odd:
        raise StoreError(
            f"{where}: files: found {len(state.files)}, with '{odd[0]}' missing or not of the plan's "
            f"{num_blocks} blocks; restore it from a copy"
        )


# ------------------------------------------------------------------------------------------------------------
# Telemetry


class Record(BaseModel):
    """A line of the telemetry. What ends in `_bytes` or `_s` is a number, whatever the event."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    event: Plain
    time: Annotated[float, Field(ge=0, le=1e12)]

    @model_validator(mode="after")
    def _figures_are_numbers(self) -> Record:
        for name, value in (self.model_extra or {}).items():
            none = value is None and self.event != "step"
            if re.search(r"_(bytes|s)$", name) and not none and not _is_figure(value):
                raise ValueError(name)
        return self


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 2**62


class OpenRecord(Record):
    visits_done: Whole


class VisitRecord(Record):
    visit: Whole
    blocks: Annotated[list[Whole], Field(max_length=4096)]
    first_step: Whole
    num_steps: Whole


class StepRecord(Record):
    step: Whole
    loss: Number | None = None


class VisitedRecord(Record):
    visit: Whole
    blocks: Annotated[list[Whole], Field(max_length=4096)]
    loss: Number
    exposed_transfer_s: Number
    commit_s: Number
    compute_s: Number


class MessageRecord(Record):
    message: Plain


class CommitRecord(Record):
    visits_done: Whole


class EvaluatingRecord(MessageRecord):
    share: Annotated[float, Field(ge=0, le=1)]


RECORDS: dict[str, type[Record]] = {
    "open": OpenRecord,
    "visit": VisitRecord,
    "step": StepRecord,
    "visited": VisitedRecord,
    "warning": MessageRecord,
    "failed": MessageRecord,
    "commit": CommitRecord,
    "evaluating": EvaluatingRecord,
}


def is_record(raw: dict[str, Any], num_blocks: int | None = None) -> bool:
    """Whether a line holds what its event must hold. `num_blocks`: of the run, where that is known."""
    event = raw.get("event")
    try:
        RECORDS.get(event, Record).model_validate(raw) if isinstance(event, str) else None
    except (ValidationError, OverflowError, RecursionError):
        return False
    blocks = raw.get("blocks") if event in ("visit", "visited") else None
    known = blocks is None or num_blocks is None or all(block < num_blocks for block in blocks)
    return isinstance(event, str) and known
