"""`lowmem train`: from a recipe's name to a finished run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowmem.config import load_recipe, recipe_name
from lowmem.data import describe_data, load_data
from lowmem.errors import ResumeError
from lowmem.evaluate import evaluate_run
from lowmem.hardware import Profile, detect_profile, load_profile
from lowmem.models import model_builder
from lowmem.plan import Plan, make_plan, read_plan
from lowmem.run_dir import RunDir, first_difference
from lowmem.trainer import Trainer

Listener = Callable[[dict[str, Any]], None]


def plan_recipe(
    recipe: str | os.PathLike[str], profile: str | os.PathLike[str] | None = None, overrides: Sequence[str] = (), folder: Path | None = None
) -> Plan:
    """The plan of a recipe on a machine (None: this one). Fits or not: see `Plan.fits`."""
    settled = load_recipe(recipe, overrides)
    machine: Profile = detect_profile() if profile is None else load_profile(profile)
    spec = describe_data(settled)
    return make_plan(model_builder(settled, spec), settled, machine, folder, spec.host_bytes)


def plan_run(recipe: str | os.PathLike[str], profile: str | os.PathLike[str] | None, overrides: Sequence[str], run_dir: Path) -> Plan:
    """The plan frozen in `run_dir` if there is one, else a new one. Raises ResumeError if the recipe is not the frozen one.

    Without a profile a run goes on with the one it began with, whatever this machine looks like now.
    """
    run = RunDir(run_dir)
    if not run.exists():
        return plan_recipe(recipe, profile, overrides, run_dir)
    plan = read_plan(run)
    given = {"recipe": load_recipe(recipe, overrides).to_dict()}
    frozen = {"recipe": plan.recipe.to_dict()}
    if profile is not None:
        given["profile"] = load_profile(profile).model_dump(mode="json", by_alias=True)
        frozen["profile"] = plan.profile.model_dump(mode="json", by_alias=True)
    difference = first_difference(frozen, given)
    if difference:
        key, was, now = difference
        raise ResumeError(f"run folder {run_dir}: made with {key} = {was}, now {now}; use the same value, or another --run-dir")
    return plan


def default_run_dir(recipe: str | os.PathLike[str]) -> Path:
    return Path("runs") / recipe_name(recipe)


def train(
    recipe: str | os.PathLike[str],
    profile: str | os.PathLike[str] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    listeners: Sequence[Listener] = (),
) -> Path:
    """Trains a recipe, goes on where a run folder stands, evaluates at the end. Returns the run folder.

    Raises BudgetError before anything is written if the plan does not fit.
    """
    folder = default_run_dir(recipe) if run_dir is None else Path(run_dir)
    train_plan(plan_run(recipe, profile, overrides, folder), folder, listeners)
    return folder


def train_plan(plan: Plan, folder: Path, listeners: Sequence[Listener] = ()) -> None:
    """Trains by a plan of `plan_run`, and evaluates at the end."""
    trainer = Trainer(model_builder(plan.recipe, describe_data(plan.recipe)), plan, folder, listeners)
    data = load_data(plan.recipe)
    train_config = plan.recipe.train
    state = trainer.fit(lambda step: data.batch(train_config.seed, step, train_config.batch_size))
    del trainer  # its blocks make room for the evaluation's
    if state.metrics is None:
        RunDir(folder).commit(state.model_copy(update={"metrics": evaluate_run(folder)}))
