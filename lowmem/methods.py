"""Plans one recipe by several methods on one machine, and says which one to take.

What is said of the quality was measured on small models (docs/results.md).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowmem.errors import ConfigError
from lowmem.job import Named, machine_of, plan_on, settled_recipe
from lowmem.planning.plan import Plan
from lowmem.planning.settings import is_resident
from lowmem.recipe import Recipe, recipe_from_dict, with_overrides
from lowmem.reporting.tables import text_table
from lowmem.units import format_bytes, format_seconds

HIDDEN = 0.1  # of a run: less waiting than this is no reason to leave the exact step
SHARE = 0.8  # of the steps: when a model grows
# What sweeps, and block coordinate with as many operations, keep of end to end's gain in fine-tuning.
KEPT = {4: "99 %", 8: "97 %"}
KEPT_BY_TURNS = "95 %"
MUON_SWEEPS, GROWTH = "sweeps of 4, Muon", f"growth at {SHARE:g}"
FROM_SCRATCH = (MUON_SWEEPS, GROWTH)  # the best first


class Way(NamedTuple):
    """A method, as changes of a recipe."""

    name: str
    changes: list[str]
    quality: str


WAYS = (
    Way("exact", [], "exact"),
    *(
        Way(
            f"sweeps of {k}", [f"blocks.sweep_steps={k}"], f"gradients {k - 1} steps old; tuning keeps {kept}"
        )
        for k, kept in KEPT.items()
    ),
    Way(
        MUON_SWEEPS,
        ["blocks.sweep_steps=4", "optimizer.name=muon"],
        "gradients 3 steps old; from scratch near exact",
    ),
    Way(
        "block coordinate", ["method=block_coordinate"], f"one block at a time; tuning keeps {KEPT_BY_TURNS}"
    ),
    Way(GROWTH, [f"blocks.grow_at={SHARE:g}"], "exact after growth; for tasks of little depth"),
    Way("blocks", ["method=diffusion_blocks"], "the depth of one block"),
)


class MethodPlan(NamedTuple):
    way: Way
    plan: Plan | None
    problem: str = ""  # why there is no plan

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits

    @property
    def waiting(self) -> float | None:
        """The share of a run in which compute waits for what moves; None: unknown."""
        time = None if self.plan is None else self.plan.predicted.time
        return None if time is None else time.exposed_s / max(time.visit_s, 1e-9)

    @property
    def moved_bytes_per_step(self) -> int | None:
        """Over the link and to and from the disk, within steps; None: blocks take turns, visit by visit."""
        if self.plan is None:
            return None
        traffic, queue = self.plan.predicted.traffic, self.plan.queue()
        if traffic is None:
            stay = is_resident(self.plan.settings, self.plan.profile.unified)
            return 0 if stay else None
        if traffic.whole is not None:
            whole: dict[str, int] = traffic.whole.model_dump()
            return sum(whole.values()) // queue.total_steps
        sweeps = (queue.num_steps - queue.grow_steps) // traffic.sweep_steps
        moved: dict[str, int] = (traffic.step * sweeps).model_dump()
        return sum(moved.values()) // queue.num_steps

    def to_dict(self) -> dict[str, Any]:
        plan = None if self.plan is None else self.plan.to_dict()
        return {
            "method": self.way.name,
            "changes": self.way.changes,
            "quality": self.way.quality,
            "moved_bytes_per_step": self.moved_bytes_per_step,
            "plan": plan,
            "problem": self.problem or None,
        }

    def cells(self) -> list[str]:
        if self.plan is None:
            return [self.way.name, "no", *[""] * 4, self.way.quality]
        predicted, moved = self.plan.predicted, self.moved_bytes_per_step
        time, steps = predicted.time, self.plan.queue().total_steps
        return [
            self.way.name,
            "yes" if self.fits else "NO",
            format_bytes(predicted.device_peak_bytes),
            "a block a visit" if moved is None else format_bytes(moved) if moved else "nothing",
            "unknown" if time is None else format_seconds(time.run_s / steps),
            "unknown" if time is None else format_bytes(time.disk_written_bytes),
            self.way.quality,
        ]


def plan_methods(
    recipe: Named,
    profile: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
) -> list[MethodPlan]:
    """The plan of a recipe by each method, all else as it is. Raises ConfigError as `load_recipe` does."""
    machine, settled, found = machine_of(profile), settled_recipe(recipe, overrides), list[MethodPlan]()
    for way in WAYS:
        try:
            found.append(MethodPlan(way, plan_on(machine, _changed(settled, way), folder)))
        except ConfigError as problem:  # the model, or another setting, does not go with it
            found.append(MethodPlan(way, None, str(problem)))
    return found


def _changed(recipe: Recipe, way: Way) -> Recipe:
    raw = recipe.to_dict()
    raw["blocks"] |= {"sweep_steps": 1, "grow_at": None, "visit_batches": None}
    with_overrides(raw, ["method=end_to_end", *way.changes])
    steps, size = raw["train"]["num_steps"], raw["blocks"]["sweep_steps"]
    raw["train"]["num_steps"] = -(-steps // size) * size
    return recipe_from_dict(raw, way.name)


def recommended(plans: Sequence[MethodPlan]) -> tuple[MethodPlan, str] | None:
    """The method to take, and why; None: nothing fits."""
    by_name = {each.way.name: each for each in plans}
    exact, others = by_name["exact"], [each for each in plans[1:] if each.fits]
    if exact.fits and exact.moved_bytes_per_step == 0:
        return exact, "all layers stay on the device, so nothing is gained by another method"
    if exact.fits and (exact.waiting is None or exact.waiting < HIDDEN):
        known = "unknown" if exact.waiting is None else f"{exact.waiting:.0%} of the time"
        return exact, f"it waits for what moves: {known}"
    if not others:
        return (exact, "no other fits") if exact.fits else None
    trained = plans[0].plan is not None and plans[0].plan.recipe.model.begins_trained
    order = sorted(others, key=lambda each: _rank(each.way.name, trained))
    why = "a trained model loses little by stale gradients" if trained else "depth for the least traffic"
    if order[0].way.name == "blocks":
        return order[0], "no other fits"
    return order[0], why


def _rank(name: str, trained: bool) -> int:
    """Less for a better one. Growth begins with one block, so it would forget what a model has learnt."""
    if trained:
        return int(name == GROWTH)
    return FROM_SCRATCH.index(name) if name in FROM_SCRATCH else len(FROM_SCRATCH)


def methods_table(plans: Sequence[MethodPlan]) -> str:
    columns = ("method", "fits", "device peak", "moved a step", "an update", "run writes", "quality")
    notes = [f"{each.way.name}: {each.problem}" for each in plans if each.problem]
    found = recommended(plans)
    if found is None:
        notes.append("recommended: none fits; `lowmem plan` without --methods says what to change")
    else:
        way = found[0].way
        settings = " ".join(f"--set {change}" for change in way.changes)
        notes.append(f"recommended: {way.name}, because {found[1]}{f' ({settings})' if settings else ''}")
    title = next((each.plan.title for each in plans if each.plan is not None), "plan")
    return text_table(title, columns, [each.cells() for each in plans], notes)
