"""`lowmem train`: from a recipe's name to a finished run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lowmem.blocks.run_dir import RunDir
from lowmem.data.datasets import describe_data, load_data
from lowmem.errors import ConfigError, ResumeError
from lowmem.inference.evaluate import evaluate_run
from lowmem.machine.detect import detect_profile
from lowmem.machine.monitor import Monitor
from lowmem.machine.profile import Profile, load_profile
from lowmem.models import model_builder
from lowmem.models.recurrent_lm import RecurrentLmModel
from lowmem.planning.plan import Plan, first_difference, make_plan, read_plan
from lowmem.recipe import Recipe, TransformerModel, load_recipe, recipe_name
from lowmem.reporting.telemetry import Listener
from lowmem.training.trainer import Trainer

MOST_LAYERS = 256  # looked at: a pass of each has to be counted
MAX_MODEL_PARTS = 32  # the largest model is found to within this part of its size


def plan_recipe(
    recipe: str | os.PathLike[str],
    profile: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
) -> Plan:
    """The plan of a recipe on a machine (None: this one). Fits or not: see `Plan.fits`."""
    return _plan_on(_machine(profile), load_recipe(recipe, overrides), folder)


def _machine(profile: str | os.PathLike[str] | None) -> Profile:
    return detect_profile() if profile is None else load_profile(profile)


def _plan_on(machine: Profile, recipe: Recipe, folder: Path | None) -> Plan:
    spec = describe_data(recipe.data, recipe.train.seq_len)
    return make_plan(model_builder(recipe, spec), recipe, machine, folder, spec.host_bytes)


def largest_models(
    recipe: str | os.PathLike[str],
    profile: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
) -> dict[str, Plan]:
    """The plans of the deepest and of the widest model that fit, all else as the recipe has it. Raises
    BudgetError if not even the least does.

    Width grows by whole heads of the recipe's size. Fit is taken to end once for good as the model grows.
    """
    machine, settled = (
        _machine(profile),
        load_recipe(recipe, overrides),
    )  # the machine once: what is free on it changes
    model, blocks = settled.model, settled.blocks.num_blocks
    if not isinstance(model, TransformerModel):
        raise ConfigError(
            f"--max-model: found model.name '{model.name}'; allowed: a model with num_layers, dim and num_heads"
        )
    head = model.dim // model.num_heads
    least = max(
        model.prelude_layers + model.coda_layers + 1 if isinstance(model, RecurrentLmModel) else 1,
        1 if blocks == "auto" else blocks,
    )

    def deep(size: int) -> list[str]:
        return [f"model.num_layers={size}"]

    def wide(size: int) -> list[str]:
        return [f"model.dim={size * head}", f"model.num_heads={size}"]

    def planned(change: list[str]) -> Plan:
        return _plan_on(machine, load_recipe(recipe, [*overrides, *change]), folder)

    found = {}
    for name, change, smallest, most in (
        ("deepest", deep, least, MOST_LAYERS),
        ("widest", wide, 1, sys.maxsize),
    ):
        best, fits, refused = planned(change(smallest)), smallest, None
        best.require_fit()
        while refused is None or refused - fits > max(fits // MAX_MODEL_PARTS, 1):
            size = min(2 * fits, most) if refused is None else (fits + refused) // 2
            if size == fits:
                break
            plan = planned(change(size))
            if plan.fits:
                best, fits = plan, size
            else:
                refused = size
        found[name] = best
    return found


def plan_run(
    recipe: str | os.PathLike[str],
    profile: str | os.PathLike[str] | None,
    overrides: Sequence[str],
    run_dir: Path,
) -> Plan:
    """The plan frozen in `run_dir` if there is one, else a new one. Raises ResumeError if the recipe is not
    the frozen one.

    Without a profile a run goes on with the one it began with, whatever this machine looks like now.
    """
    run = RunDir(run_dir)
    if not run.exists():
        return plan_recipe(recipe, profile, overrides, run_dir)
    plan = read_plan(run)
    settled = load_recipe(recipe, overrides)
    given = {"recipe": settled.to_dict()}
    frozen = {"recipe": plan.recipe.to_dict()}
    if profile is not None:
        given["profile"] = load_profile(profile).model_dump(mode="json", by_alias=True)
        frozen["profile"] = plan.profile.model_dump(mode="json", by_alias=True)
    difference = first_difference(frozen, given)
    if difference:
        key, was, now = difference
        raise ResumeError(
            f"run folder {run_dir}: made with {key} = {was}, now {now}; use the same value, or another --run-dir"
        )
    return plan.model_copy(update={"recipe": settled})


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
    trainer = Trainer(
        model_builder(plan.recipe, describe_data(plan.recipe.data, plan.recipe.train.seq_len)),
        plan,
        folder,
        listeners,
    )
    data = load_data(plan.recipe.data, plan.recipe.train.seq_len)
    train_config = plan.recipe.train
    state = trainer.fit(lambda step: data.batch(train_config.seed, step, train_config.batch_size))
    del trainer  # its blocks make room for the evaluation's
    if state.metrics is None:
        with Monitor(plan.profile.unified) as monitor:
            metrics = evaluate_run(folder)
        measured = {**state.measured, "evaluation_peak_bytes": monitor.run_peak.device_bytes}
        RunDir(folder).commit(state.model_copy(update={"metrics": metrics, "measured": measured}))
