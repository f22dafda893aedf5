"""`lowmem train` and `lowmem plan`: from a recipe's name to a plan, and to a finished run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem.blocks.run_dir import RunDir, RunState
from lowmem.data.datasets import Dataset, describe_data, load_data
from lowmem.errors import ConfigError, ResumeError
from lowmem.inference.evaluate import evaluate_on
from lowmem.machine.detect import detect_profile
from lowmem.machine.monitor import Monitor
from lowmem.machine.profile import Profile, load_profile
from lowmem.models import model_builder
from lowmem.planning.plan import Plan, check_continues, make_plan, read_plan
from lowmem.planning.run_data import (
    keep_identity,
    require_known_data,
    require_sources,
    spec_of,
    tokenizer_of,
    with_identity,
)
from lowmem.recipe import (
    MOST_DIM,
    MOST_LAYERS,
    Recipe,
    TransformerModel,
    load_recipe,
    recipe_from_dict,
    recipe_name,
)
from lowmem.reporting.telemetry import Listener, Recorder
from lowmem.training.ranks import ALONE, Ranks
from lowmem.training.trainer import Trainer
from lowmem.units import counted, format_bytes

MAX_MODEL_PARTS = 32  # the largest model is found to within this part of its size


Named = str | os.PathLike[str] | Recipe  # a recipe's name, its path, or itself


def plan_recipe(
    recipe: Named,
    profile: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
) -> Plan:
    """The plan of a recipe on a machine (None: this one). It may not fit; see `Plan.fits`."""
    return plan_on(machine_of(profile), settled_recipe(recipe, overrides), folder)


def settled_recipe(recipe: Named, overrides: Sequence[str]) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)


def machine_of(profile: str | os.PathLike[str] | None) -> Profile:
    return detect_profile() if profile is None else load_profile(profile)


def plan_on(machine: Profile, recipe: Recipe, folder: Path | None) -> Plan:
    spec = describe_data(recipe.data, recipe.train.seq_len)
    return make_plan(model_builder(recipe, spec), recipe, machine, folder, spec.host_bytes, spec.num_test)


def largest_models(
    recipe: str | os.PathLike[str],
    profile: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
    say: Callable[[str], object] = len,
) -> dict[str, Plan]:
    """The plans of the deepest and of the widest model that fit, all else as the recipe has it.

    `say` is given a line about every size that was tried. Width grows by whole heads of the recipe's size.
    Fit is taken to end once for good as the model grows. Raises BudgetError if not even the smallest model
    fits.
    """
    # The machine is looked at once, because what is free on it changes.
    machine, settled = machine_of(profile), load_recipe(recipe, overrides)
    model, blocks = settled.model, settled.blocks.num_blocks
    if not isinstance(model, TransformerModel):
        raise ConfigError(
            f"--max-model: found model.name '{model.name}'; allowed: a model with num_layers, dim and "
            "num_heads"
        )
    head = model.dim // model.num_heads

    def planned(*change: str) -> Plan:
        return plan_on(machine, load_recipe(recipe, [*overrides, *change]), folder)

    def told(words: str, plan: Plan) -> Plan:
        need, verb = format_bytes(plan.predicted.device_needed_bytes), "fits" if plan.fits else "does not fit"
        say(f"{words}: {verb}, {need} with headroom on the device")
        return plan

    def deep(size: int) -> Plan:
        return told(counted(size, "layer"), planned(f"model.num_layers={size}"))

    def wide(size: int) -> Plan:
        return told(f"dim {size * head}", planned(f"model.dim={size * head}", f"model.num_heads={size}"))

    least = max(model.least_layers, 1 if blocks == "auto" else blocks)
    return {"deepest": _largest(deep, least, MOST_LAYERS), "widest": _largest(wide, 1, MOST_DIM // head)}


def _largest(planned: Callable[[int], Plan], smallest: int, most: int) -> Plan:
    """The plan of the largest size that fits: doubling, then halving the interval."""
    best, fits, refused = planned(smallest), smallest, None
    best.require_fit()
    while refused is None or refused - fits > max(fits // MAX_MODEL_PARTS, 1):
        size = min(2 * fits, most) if refused is None else (fits + refused) // 2
        if size == fits:
            break
        plan = planned(size)
        if plan.fits:
            best, fits = plan, size
        else:
            refused = size
    return best


def plan_run(
    recipe: Named,
    profile: str | os.PathLike[str] | None,
    overrides: Sequence[str],
    run_dir: Path,
) -> Plan:
    """The plan frozen in `run_dir` if there is one, else a new one.

    Without a profile a run goes on with the one that it began with, whatever this machine looks like now.
    Raises ResumeError if the recipe is not the frozen one.
    """
    run = RunDir(run_dir)
    if not run.exists():
        return plan_recipe(recipe, profile, overrides, run_dir)
    plan, settled = read_plan(run), settled_recipe(recipe, overrides)
    frozen: dict[str, Any] = {"recipe": plan.recipe.to_dict()}
    given: dict[str, Any] = {"recipe": settled.to_dict()}
    if profile is not None:
        frozen["profile"] = plan.profile.model_dump(mode="json", by_alias=True)
        given["profile"] = load_profile(profile).model_dump(mode="json", by_alias=True)
    check_continues(run_dir, frozen, given)
    require_sources(plan)
    return plan.model_copy(update={"recipe": settled})


def plan_resume(folder: Path, num_steps: int | None = None) -> Plan:
    """The frozen plan of a run, to go on with; `num_steps`: with so many steps in all. Writes nothing.

    Raises ResumeError where visits that are made would have been others with so many steps, and where the
    folder alone does not tell the data.
    """
    run = RunDir(folder)
    plan = read_plan(run)
    require_known_data(plan, folder)
    require_sources(plan)
    was = plan.recipe.train.num_steps
    if num_steps is None or num_steps == was:
        return plan
    raw = plan.recipe.to_dict()
    recipe = recipe_from_dict({**raw, "train": {**raw["train"], "num_steps": num_steps}}, "--steps")
    other = plan.model_copy(update={"recipe": recipe})
    _require_same_visits(folder, plan, other)
    made = plan_on(plan.profile, recipe, folder)
    known = made.fits and made.settings == plan.settings
    return other.model_copy(update={"predicted": made.predicted}) if known else other


def _require_same_visits(folder: Path, plan: Plan, other: Plan) -> None:
    """Raises ResumeError where visits that are made would have been others by the `other` plan."""
    done = (RunDir(folder).read_state() or RunState()).visits_done
    before, now = plan.queue(), other.queue()
    if not done or (done <= now.num_visits and before.visit(done - 1) == now.visit(done - 1)):
        return
    last = before.visit(done - 1)
    reached, allowed = last.first_step + last.num_steps, f"{last.first_step + last.num_steps} or more"
    if last.num_steps < before.visit_steps:
        allowed = f"{before.num_steps}, because its last visits were cut to {last.num_steps} steps"
    raise ResumeError(
        f"run folder {folder}: --steps: found {now.num_steps}, and {reached} steps are made; "
        f"allowed: {allowed}; choose another number, or train anew in another --run-dir"
    )


def keep_length(plan: Plan, folder: Path, accept_data: bool = False) -> str:
    """Makes the steps of a plan of `plan_resume` those of the run. Returns what that means, in one line.

    The metrics of a finished run go: they are those of other weights. Raises as `train_plan` does.
    """
    run, train = RunDir(folder), plan.recipe.train
    run.acquire()
    try:
        frozen = read_plan(run)
        was = frozen.recipe.train.num_steps
        if was == train.num_steps:
            return ""
        plan.require_fit()
        with_identity(plan, folder, accept_data)
        state = run.read_state()
        if state is not None and state.metrics is not None:
            run.commit(state.model_copy(update={"metrics": None}))
        run.replace_plan(
            frozen.model_copy(update={"recipe": plan.recipe, "predicted": plan.predicted}).to_dict()
        )
    finally:
        run.release()
    rate = "stays as it is"
    if train.lr_schedule == "cosine":
        rate = f"follows the cosine of {train.num_steps} steps from here on, so it jumps at this place"
    return f"{folder}: {train.num_steps} steps in place of {was}; the learning rate {rate}"


def default_run_dir(recipe: str | os.PathLike[str]) -> Path:
    return Path("runs") / recipe_name(recipe)


def train(
    recipe: Named,
    profile: str | os.PathLike[str] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    listeners: Sequence[Listener] = (),
    accept_data: bool = False,
) -> Path:
    """Trains a recipe, goes on where a run folder stands, evaluates at the end. Returns the run folder.

    `accept_data`: goes on also if the data have changed, and records that. Raises BudgetError before anything
    is written if the plan does not fit.
    """
    if run_dir is not None:
        folder = Path(run_dir)
    elif isinstance(recipe, Recipe):
        raise ConfigError("run_dir: missing; allowed where the recipe has no name: a folder; give one")
    else:
        folder = default_run_dir(recipe)
    train_plan(plan_run(recipe, profile, overrides, folder), folder, listeners, accept_data)
    return folder


def train_plan(
    plan: Plan,
    folder: Path,
    listeners: Sequence[Listener] = (),
    accept_data: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Trains by a plan of `plan_run`, and evaluates at the end; with other `ranks` that make the same call.

    Raises ResumeError if the data are not those that the run began with, unless `accept_data`.
    """
    plan.require_fit()
    train_config = plan.recipe.train
    plan, notices = with_identity(plan, folder, accept_data)
    if ranks.size > 1:  # one process alone does not pay for these imports
        from lowmem.distributed.agreement import require_agreement

        require_agreement(ranks, plan, folder)
    data = load_data(plan.recipe.data, train_config.seq_len, tokenizer_of(plan))
    if notices and plan.data is not None and ranks.leads:
        keep_identity(folder, plan.data)
    notices += [("warning", {"message": line}) for line in data.warnings]
    build = model_builder(plan.recipe, spec_of(plan))
    trainer = Trainer(build, plan, folder, listeners, notices, ranks)
    if plan.recipe.model.begins_trained:
        if ranks.leads and not RunDir(folder).exists():
            trainer.begin()
            _evaluate(plan, folder, data.unaugmented(), listeners, first=True)
        ranks.told(True)  # a rank that opened the folder before would hold a lock in it

    def batches(step: int) -> Mapping[str, Any]:
        return data.batch(train_config.seed, step, train_config.batch_size)

    state: RunState | None
    if ranks.size > 1 and plan.recipe.method == "end_to_end":
        from lowmem.distributed.engine import fit_with_engine

        state = fit_with_engine(ranks, trainer, build, batches)
    else:
        state = trainer.fit(batches)
    ranks.gathered(True)  # all have left the folder, and given back their locks
    if state is not None and state.metrics is None and ranks.leads:
        _evaluate(plan, folder, data.unaugmented(), listeners)


def _evaluate(
    plan: Plan, folder: Path, data: Dataset, listeners: Sequence[Listener], first: bool = False
) -> RunState:
    """Commits the finished run's metrics, or the `first` ones, before any step.

    It is a phase of the run: under the lock, and with records (`evaluating`, `evaluated`) in the telemetry.
    """
    run = RunDir(folder)
    run.acquire()
    try:
        with contextlib.closing(Recorder(run.telemetry_path)) as recorder:
            recorder.listeners = list(listeners)

            def say(line: str, share: float) -> None:
                recorder.write("evaluating", message=line, share=round(share, 4))

            say("evaluation: opens the last commit", 0.0)
            with Monitor(plan.profile.unified) as monitor:
                metrics = evaluate_on(folder, data, say)
            state = run.read_state() or RunState()
            measured = {**state.measured, "evaluation_peak_bytes": monitor.run_peak.device_bytes}
            kind = "first_metrics" if first else "metrics"
            state = state.model_copy(update={kind: metrics, "measured": measured})
            run.commit(state)
            recorder.write("evaluated", metric=metrics["metric"], value=metrics["value"])
    finally:
        run.release()
    return state
