"""The verbs that plan and train."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem.cli.common import (
    AcceptDataOption,
    DryRunOption,
    JsonOption,
    LogToOption,
    ProfileOption,
    QuietOption,
    RecipeArgument,
    RunArgument,
    SetOption,
    app,
    known,
)
from lowmem.errors import BudgetError, ConfigError, LowmemError
from lowmem.terminal import complain, say, say_json, say_warning, stop_if_interrupted
from lowmem.units import counted


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Turns the garbage collector off.

    torch brings half a million objects that live to the end. To look for garbage among them takes a third of
    a plan's time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def _only_json(as_json: bool) -> Iterator[None]:
    """A plan that does not fit comes with its table, except where stdout holds one JSON object."""
    try:
        yield
    except BudgetError as error:
        raise BudgetError(str(error), "" if as_json else error.table) from None


@app.command()
def train(
    recipe: RecipeArgument,
    profile: ProfileOption = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", help="default: runs/RECIPE; the same command again goes on where it stood"),
    ] = None,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    accept_data: AcceptDataOption = False,
    log_to: LogToOption = None,
    devices: Annotated[
        int, typer.Option("--devices", help="train on so many cards, or processes, of this machine")
    ] = 1,
) -> None:
    """Train a recipe, or go on with a run. Prints the report."""
    _check_machine(profile, log_to)
    _check_recipe(recipe, set_ or [])
    with _ranks(devices) as ranks:
        if ranks is not None:
            overrides = set_ or []
            _train_with(ranks, recipe, profile, run_dir, overrides, as_json, quiet, accept_data, log_to or [])
            return
    from lowmem import from_data, job

    wanted: Any = recipe
    overrides, text = set_ or [], ""
    folder = run_dir or job.default_run_dir(recipe)
    if from_data.is_data(recipe):
        folder = run_dir or from_data.default_run_dir(recipe)
        wanted, lines = from_data.recipe_from_data(recipe, overrides)
        overrides, text = [], from_data.recipe_text(wanted, lines)
        say("\n".join(lines), sys.stderr)
    plan = job.plan_run(wanted, profile, overrides, folder)
    if dry_run or not plan.fits:
        _print_plan(plan, as_json)
        return
    _train(plan, folder, as_json, quiet, accept_data, log_to or [], text)


@app.command()
def init(
    path: Annotated[str, typer.Argument(help="a text file, or a folder of pictures")],
    out: Annotated[
        Path | None, typer.Option("--out", help="default: NAME.yaml in this folder, after the data")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Write the recipe that `lowmem train PATH` would train, and say what was found and guessed."""
    from lowmem import from_data
    from lowmem.reporting.output import check_output, write_output

    recipe, lines = from_data.recipe_from_data(path, set_ or [])
    target = out or Path(f"{from_data.default_run_dir(path).name}.yaml")
    if check_output(target, "--out").exists():
        raise ConfigError(f"--out: {target} exists; it is left as it is; give another name")
    text = from_data.recipe_text(recipe, lines)
    say("\n".join([*lines, f"wrote {write_output(target, text.encode(), '--out')}"]))


@app.command()
def resume(
    run: RunArgument,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=1, help="train.num_steps in all: further than first planned, or less far"
        ),
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    accept_data: AcceptDataOption = False,
) -> None:
    """Go on with a run as it was begun, from its folder alone; or train a finished one further."""
    from lowmem import job
    from lowmem.machine.detect import training_device

    plan = job.plan_resume(run, steps)
    if dry_run or not plan.fits:
        _print_plan(plan, as_json)
        return
    training_device(plan.profile)
    told = job.keep_length(plan, run, accept_data)
    if told:
        say(told, sys.stderr)
    _train(plan, run, as_json, quiet, accept_data, [])


@app.command()
def finetune(
    model: Annotated[str, typer.Argument(help="a model's folder: config.json and safetensors files")],
    data: Annotated[
        str, typer.Argument(help="rows with messages, or prompt and completion, or text: JSONL, CSV, Parquet")
    ],
    profile: ProfileOption = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", help="default: runs/MODEL; the same command again goes on where it stood"),
    ] = None,
    epochs: Annotated[float, typer.Option("--epochs", help="how often every row is trained on")] = 1.0,
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="lora: train small matrices beside frozen weights")
    ] = None,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    accept_data: AcceptDataOption = False,
    log_to: LogToOption = None,
) -> None:
    """Train a model from a Hugging Face folder further, on rows of a file. Prints the report."""
    from lowmem.data.packages import require_package

    _check_machine(profile, log_to)
    for module in ("transformers", *(["peft"] if adapter else [])):
        require_package(module, "finetune")
    from lowmem import job
    from lowmem.finetuning import default_run_dir, finetune_recipe

    folder = run_dir or default_run_dir(model)
    recipe = finetune_recipe(model, data, set_ or [], epochs, adapter)
    plan = job.plan_run(recipe, profile, [], folder)
    if dry_run or not plan.fits:
        _print_plan(plan, as_json)
        return
    _train(plan, folder, as_json, quiet, accept_data, log_to or [])


@contextlib.contextmanager
def _ranks(devices: int) -> Iterator[Any]:
    """This process among the ranks that a launcher has started; None where there is only one.

    `devices`: to start a launcher for, where none has started this process. Only rank 0 says anything.
    """
    from lowmem.distributed.launch import launch, launched, take_place

    found = launched()
    if found is None:
        if devices != 1:
            launch(devices, _without_devices(sys.argv[1:]))
        yield None
        return
    take_place(found)
    from lowmem.distributed.ranks import joined

    try:
        with joined(found, complain) as ranks:
            yield ranks
    except (LowmemError, KeyboardInterrupt) as problem:
        if found.leads:
            raise
        raise typer.Exit(problem.exit_code if isinstance(problem, LowmemError) else 130) from None


def _without_devices(arguments: list[str]) -> list[str]:
    kept, skip = list[str](), False
    for argument in arguments:
        if not skip and argument != "--devices" and not argument.startswith("--devices="):
            kept.append(argument)
        skip = argument == "--devices"
    return kept


def _train_with(
    ranks: Any,
    recipe: str,
    profile: str | None,
    run_dir: Path | None,
    overrides: list[str],
    as_json: bool,
    quiet: bool,
    accept_data: bool,
    log_to: list[str],
) -> None:
    """Trains with other ranks. Rank 0 plans, prints and logs."""
    from lowmem import job
    from lowmem.distributed.agreement import common_plan

    folder = run_dir or job.default_run_dir(recipe)
    plan = common_plan(ranks, lambda: job.plan_run(recipe, profile, overrides, folder))
    if ranks.leads:
        with _only_json(as_json):
            plan.require_fit()
        _train(plan, folder, as_json, quiet, accept_data, log_to, ranks=ranks)
    else:
        own = plan.model_copy(update={"recipe": job.settled_recipe(recipe, overrides)})
        job.train_plan(own, folder, [stop_if_interrupted], accept_data, ranks)


def _train(
    plan: Any,
    folder: Path,
    as_json: bool,
    quiet: bool,
    accept_data: bool,
    log_to: list[str],
    recipe_text: str = "",
    ranks: Any = None,
) -> None:
    """Trains by a plan and prints the report. `recipe_text`: of a recipe that no file holds, for the run."""
    from lowmem import job
    from lowmem.machine.detect import training_device
    from lowmem.reporting.dashboard import live_view
    from lowmem.reporting.loggers import open_logger
    from lowmem.reporting.report import read_report, read_status
    from lowmem.training.ranks import ALONE

    training_device(plan.profile)

    if not quiet:
        say(plan.table(), sys.stderr)
    if (folder / "plan.json").exists() and read_status(folder)["state"] == "finished":
        further = f"train it further with lowmem resume {folder} --steps N"
        say(
            f"{folder}: this run is finished; choose another --run-dir to train again, or {further}",
            sys.stderr,
        )
    with contextlib.ExitStack() as opened:
        listeners = [
            stop_if_interrupted,
            *(opened.enter_context(open_logger(name, folder, plan.recipe.to_dict())) for name in log_to),
        ]
        opened.enter_context(_only_json(as_json))
        listeners.append(say_warning if quiet else opened.enter_context(live_view(folder)))
        if recipe_text:
            listeners.append(_keeper(folder, recipe_text))
        job.train_plan(plan, folder, listeners, accept_data, ranks or ALONE)
    report = read_report(folder)
    say_json(report.content) if as_json else say(report.table())


# What is wrong is refused, and what is not installed is named, at once: to load torch takes seconds.


def _check_recipe(recipe: str, overrides: list[str], trains: bool = True) -> None:
    """`trains`: the data will be read, so the packages for them must be there."""
    from lowmem import from_data
    from lowmem.recipe import read_recipe, recipe_from_dict, require_packages

    made = from_data.raw_recipe if trains and from_data.is_data(recipe) else read_recipe
    raw, where, *_ = made(recipe, overrides)
    known = recipe_from_dict(raw, where)
    if trains:
        require_packages(known)


def _check_machine(profile: str | None, log_to: list[str] | None = None) -> None:
    from lowmem.machine.profile import load_profile
    from lowmem.reporting.loggers import require_logger

    if profile is not None:
        load_profile(profile)
    for name in log_to or []:
        require_logger(name)


def _keeper(folder: Path, text: str) -> Callable[[dict[str, Any]], None]:
    """A listener that keeps the recipe in the run, once its folder is the run's."""
    from lowmem.from_data import keep_recipe

    def keep(record: dict[str, Any]) -> None:
        if record["event"] == "open" and not (folder / "recipe.yaml").exists():
            keep_recipe(folder, text)

    return keep


@app.command()
@no_collection()
def plan(
    recipe: Annotated[
        str, typer.Argument(help="a recipe's name, the path of a YAML file, or a model's folder to finetune")
    ],
    profile: Annotated[
        list[str] | None,
        typer.Option("--profile", help="as of train; several are compared", autocompletion=known("hardware")),
    ] = None,
    set_: SetOption = None,
    max_model: Annotated[
        bool, typer.Option("--max-model", help="the deepest and the widest model of this recipe that fit")
    ] = False,
    as_json: JsonOption = False,
    data: Annotated[
        str | None, typer.Argument(help="with a model's folder: the file of rows; not needed")
    ] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", help="as of finetune")] = None,
    methods: Annotated[
        bool, typer.Option("--methods", help="this recipe by each method, side by side, and which to take")
    ] = False,
    devices: Annotated[
        int, typer.Option("--devices", min=1, max=10**6, help="what so many devices send to each other")
    ] = 1,
    machines: Annotated[int, typer.Option("--machines", min=1, help="on which the devices are")] = 1,
    link: Annotated[
        float, typer.Option("--link-gib-per-s", min=1e-6, max=1e6, help="of each machine, one way")
    ] = 1.0,
) -> None:
    """Predict what a recipe takes on a machine, or on several, without training or allocating it."""
    for name in profile or []:
        _check_machine(name)
    if not os.path.isdir(recipe):  # else a model's folder
        _check_recipe(recipe, set_ or [], trains=False)
    from lowmem.finetuning import finetune_recipe, is_model_folder
    from lowmem.job import plan_recipe
    from lowmem.planning.plan import plans_table

    folder = None if profile else Path("runs")
    wanted: Any = recipe
    if is_model_folder(recipe):
        wanted = finetune_recipe(recipe, data, set_ or [], adapter=adapter)
    if data is not None and wanted is recipe:
        raise ConfigError(
            f"{data}: a file of rows goes with a model's folder, and {recipe} is none; leave it out"
        )
    if max_model:
        _print_largest(recipe, profile or [], set_ or [], folder, as_json)
        return
    if methods:
        _print_methods(wanted, profile or [], set_ or [], folder, as_json)
        return
    if devices > 1:
        _print_cluster(wanted, profile or [], set_ or [], folder, (devices, machines), link, as_json)
        return
    names: list[str] | list[None] = profile or [None]
    plans = [plan_recipe(wanted, name, set_ or [], folder) for name in names]
    if len(plans) == 1:
        _print_plan(plans[0], as_json)
    else:
        say_json({"plans": [plan.to_dict() for plan in plans]}) if as_json else say(plans_table(plans))


def _print_largest(
    recipe: str, profiles: list[str], overrides: list[str], folder: Path | None, as_json: bool
) -> None:
    from lowmem.job import largest_models

    if len(profiles) > 1:
        raise ConfigError(
            f"--max-model: found {len(profiles)} profiles; allowed: one; give them one after the other"
        )
    machine = profiles[0] if profiles else None
    with _only_json(as_json):
        found = largest_models(recipe, machine, overrides, folder, lambda line: say(line, sys.stderr))
    if as_json:
        say_json({name: plan.to_dict() for name, plan in found.items()})
        return
    for name, plan in found.items():
        model: Any = plan.recipe.model
        size = f"{counted(model.num_layers, 'layer')}, dim {model.dim}, {model.num_heads} heads"
        say(f"{name}: {size}\n{plan.table()}\n")


def _print_methods(
    recipe: Any, profiles: list[str], overrides: list[str], folder: Path | None, as_json: bool
) -> None:
    from lowmem.methods import methods_table, plan_methods

    if len(profiles) > 1:
        raise ConfigError(
            f"--methods: found {len(profiles)} profiles; allowed: one; give them one after the other"
        )
    with _only_json(as_json):
        found = plan_methods(recipe, profiles[0] if profiles else None, overrides, folder)
    if as_json:
        say_json({"methods": [each.to_dict() for each in found]})
    else:
        say(methods_table(found))


def _print_cluster(
    recipe: Any,
    profiles: list[str],
    overrides: list[str],
    folder: Path | None,
    size: tuple[int, int],
    link: float,
    as_json: bool,
) -> None:
    from lowmem.cluster import cluster_table, plan_cluster
    from lowmem.distributed.exchange import Cluster
    from lowmem.units import GIB

    if len(profiles) > 1:
        raise ConfigError(
            f"--devices: found {len(profiles)} profiles; allowed: one; give them one after the other"
        )
    cluster, machine = Cluster(*size), profiles[0] if profiles else None
    spreads = plan_cluster(recipe, machine, overrides, cluster, link * GIB, folder)
    if as_json:
        say_json({"methods": [spread.to_dict() for spread in spreads]})
    else:
        say(cluster_table(spreads, cluster, link * GIB))


def _print_plan(plan: Any, as_json: bool) -> None:
    """Prints a plan; raises BudgetError when it does not fit."""
    if as_json:
        say_json(plan.to_dict())
    elif plan.fits:
        say(plan.table())
    with _only_json(as_json):
        plan.require_fit()
