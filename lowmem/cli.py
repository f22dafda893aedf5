"""The command line. Each verb is a thin call of one public function; nothing heavy is imported before it is
needed.

Exit codes: 0 done, 1 run failed, 2 bad input, 3 plan does not fit, 130 interrupted. Progress goes to stderr,
results to stdout, both as `terminal.py` does it. `--json` prints one JSON object, whatever becomes of stderr.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from lowmem.errors import BudgetError, ConfigError, LowmemError
from lowmem.terminal import (
    complain,
    flushed,
    interruptible,
    open_streams,
    say,
    say_json,
    say_warning,
    stop_if_interrupted,
    unforeseen,
)
from lowmem.units import counted

INTERRUPTED = 130
MOST_SEED = 2**63 - 1  # as of a recipe
MOST_SAMPLES, MOST_TOKENS = 100_000, 1_000_000  # of one file; each sample is in memory until it is written

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


def _known(kind: str) -> Callable[[str], list[str]]:
    """What a shell completes a name to."""

    def complete(incomplete: str) -> list[str]:
        from lowmem.schema import names_in

        return [name for name in names_in(kind) if name.startswith(incomplete)]

    return complete


RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="a recipe's name (`lowmem recipes`) or the path of a YAML file; of train: or your data",
        autocompletion=_known("recipes"),
    ),
]
RunArgument = Annotated[Path, typer.Argument(help="a run folder, as written by `lowmem train`")]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        help="a machine's name (`lowmem profiles`) or a YAML file; default: this machine",
        autocompletion=_known("hardware"),
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="override a key of the recipe, as in --set blocks.num_blocks=6"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="print the plan and write nothing")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="no progress while training")]
AcceptDataOption = Annotated[
    bool, typer.Option("--accept-data", help="go on although the data have changed, and record that")
]
LogToOption = Annotated[
    list[str] | None, typer.Option("--log-to", help="also send telemetry to tensorboard, wandb or trackio")
]


def _say_version(wanted: bool) -> None:
    if wanted:
        from lowmem import __version__

        say(f"lowmem {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def lowmem(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version", callback=_say_version, is_eager=True),
    ] = False,
) -> None:
    """Train models that do not fit: one block at a time, with a memory budget you can check."""
    if context.invoked_subcommand is None:
        say(context.get_help())


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
) -> None:
    """Train a recipe, or go on with a run. Prints the report."""
    _check_names(recipe, profile)
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
    from lowmem import job
    from lowmem.finetuning import default_run_dir, finetune_recipe

    folder = run_dir or default_run_dir(model)
    recipe = finetune_recipe(model, data, set_ or [], epochs, adapter)
    plan = job.plan_run(recipe, profile, [], folder)
    if dry_run or not plan.fits:
        _print_plan(plan, as_json)
        return
    _train(plan, folder, as_json, quiet, accept_data, log_to or [])


def _train(
    plan: Any,
    folder: Path,
    as_json: bool,
    quiet: bool,
    accept_data: bool,
    log_to: list[str],
    recipe_text: str = "",
) -> None:
    """Trains by a plan and prints the report. `recipe_text`: of a recipe that no file holds, for the run."""
    from lowmem import job
    from lowmem.machine.detect import training_device
    from lowmem.reporting.dashboard import live_view
    from lowmem.reporting.loggers import open_logger
    from lowmem.reporting.report import read_report

    training_device(plan.profile)

    if not quiet:
        say(plan.table(), sys.stderr)
    status = read_report(folder).content["progress"] if (folder / "plan.json").exists() else None
    if status and status["visits_done"] == status["visits_total"]:
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
        job.train_plan(plan, folder, listeners, accept_data)
    report = read_report(folder)
    say_json(report.content) if as_json else say(report.table())


def _check_names(recipe: str, profile: str | None) -> None:
    """Refuses an unknown recipe or machine at once: to load torch takes seconds."""
    from lowmem.from_data import is_data
    from lowmem.machine.profile import load_profile
    from lowmem.schema import find_file

    if not is_data(recipe):
        find_file(recipe, "recipes", "recipe", ConfigError)
    if profile is not None:
        load_profile(profile)


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
        typer.Option(
            "--profile", help="as of train; several are compared", autocompletion=_known("hardware")
        ),
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
) -> None:
    """Predict what a recipe takes on a machine, or on several, without training or allocating it."""
    from lowmem.finetuning import finetune_recipe, is_model_folder
    from lowmem.job import largest_models, plan_recipe
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
        if profile and len(profile) > 1:
            raise ConfigError(
                f"--max-model: found {len(profile)} profiles; allowed: one; give them one after the other"
            )
        with _only_json(as_json):
            found = largest_models(recipe, profile[0] if profile else None, set_ or [], folder)
        if as_json:
            say_json({name: plan.to_dict() for name, plan in found.items()})
        for name, plan in found.items() if not as_json else ():
            model: Any = plan.recipe.model
            say(
                f"{name}: {counted(model.num_layers, 'layer')}, dim {model.dim}, {model.num_heads} "
                f"heads\n{plan.table()}\n"
            )
        return
    if methods:
        return _print_methods(wanted, profile, set_ or [], folder, as_json)
    machines: list[str] | list[None] = profile or [None]
    plans = [plan_recipe(wanted, name, set_ or [], folder) for name in machines]
    if len(plans) == 1:
        _print_plan(plans[0], as_json)
    else:
        say_json({"plans": [plan.to_dict() for plan in plans]}) if as_json else say(plans_table(plans))


def _print_methods(
    recipe: Any, profiles: list[str] | None, overrides: list[str], folder: Path | None, as_json: bool
) -> None:
    from lowmem.methods import methods_table, plan_methods

    if profiles and len(profiles) > 1:
        raise ConfigError(
            f"--methods: found {len(profiles)} profiles; allowed: one; give them one after the other"
        )
    with _only_json(as_json):
        found = plan_methods(recipe, profiles[0] if profiles else None, overrides, folder)
    if as_json:
        say_json({"methods": [each.to_dict() for each in found]})
    else:
        say(methods_table(found))


def _print_plan(plan: Any, as_json: bool) -> None:
    """Prints a plan; raises BudgetError when it does not fit."""
    if as_json:
        say_json(plan.to_dict())
    elif plan.fits:
        say(plan.table())
    with _only_json(as_json):
        plan.require_fit()


@app.command()
def profiles(name: Annotated[str | None, typer.Argument(help="print this profile's YAML")] = None) -> None:
    """List machine profiles, or print one."""
    from lowmem.machine.profile import list_profiles, load_profile, profile_to_yaml
    from lowmem.reporting.tables import text_table

    if name is not None:
        say(profile_to_yaml(load_profile(name)).rstrip("\n"))
        return
    loaded = [load_profile(known) for known in list_profiles()]
    rows = [
        (
            p.name,
            p.device.type,
            f"{p.device.memory_gib:.1f}",
            f"{p.host.memory_gib:.1f}",
            p.device.compute_dtype,
        )
        for p in loaded
    ]
    say(text_table("machine profiles", ("name", "device", "device GiB", "host GiB", "computes in"), rows))


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="print this recipe's YAML")] = None) -> None:
    """List recipes, or print one."""
    from lowmem.recipe import list_recipes
    from lowmem.schema import find_file, read_text

    def text(known: str) -> str:
        return read_text(find_file(known, "recipes", "recipe", ConfigError), ConfigError)

    if name is not None:
        say(text(name).rstrip("\n"))
        return
    width = max(map(len, list_recipes())) + 2
    for known in list_recipes():
        comment = text(known).splitlines()[0]
        say(f"{known:<{width}}{comment.lstrip('# ')}")


@app.command()
def detect(
    measure: Annotated[
        bool, typer.Option("--measure", help="measure rates and the runtime floor (about a minute)")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="write the profile to this YAML file")] = None,
) -> None:
    """Describe this machine as a profile."""
    from lowmem.machine.detect import detect_profile
    from lowmem.machine.profile import profile_to_yaml
    from lowmem.reporting.output import check_output, write_output

    if out is not None and check_output(out, "--out").exists():
        raise ConfigError(f"--out: {out} exists; it is left as it is; give another name")
    text = profile_to_yaml(detect_profile(measure))
    say(text.rstrip("\n") if out is None else f"wrote {write_output(out, text.encode(), '--out')}")


@app.command()
def status(
    run: RunArgument,
    watch: Annotated[bool, typer.Option("--watch", help="redraw until the run stops")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show where a run stands, from any terminal, also after it died."""
    import shutil

    from lowmem.reporting import dashboard
    from lowmem.reporting.report import read_status

    if as_json:
        say_json(read_status(run))
    elif watch:
        dashboard.watch(run)
    else:
        say("\n".join(dashboard.status_lines(run, shutil.get_terminal_size().columns)[1]))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="a run folder; several are compared")],
    as_json: JsonOption = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="write one self-contained page to this file")
    ] = None,
) -> None:
    """Predicted against measured, per category and per block; time, traffic, result.

    Several runs beside each other.
    """
    from lowmem.reporting.report import comparison_table, read_report

    if html is not None:
        from lowmem.reporting.page import write_page

        say(f"wrote {write_page(runs, html)}")
        return
    reports = [read_report(run) for run in runs]
    contents = [result.content for result in reports]
    if as_json:
        say_json(contents[0] if len(runs) == 1 else {"runs": contents})
    else:
        say(reports[0].table() if len(runs) == 1 else comparison_table([str(run) for run in runs], reports))


@app.command("eval")
def eval_(
    run: RunArgument,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="evaluate on other data: a key of data, as in --data path=FILE"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a run's last commit on its test data."""
    from lowmem.inference.evaluate import evaluate_run

    metrics = evaluate_run(run, data, lambda line: say(line, sys.stderr))
    if as_json:
        say_json(metrics)
        return
    for name, value in metrics.items():
        if isinstance(value, list):
            for row in value:
                say(
                    "  "
                    + ", ".join(
                        f"{key} {item:.4g}" if isinstance(item, float) else f"{key} {item}"
                        for key, item in row.items()
                    )
                )
        else:
            say(f"{name:<16} {value:.4f}" if isinstance(value, float) else f"{name:<16} {value}")


@app.command()
def sample(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option("--out", help="default: a file in the run folder")] = None,
    num: Annotated[
        int | None,
        typer.Option(
            "--num", min=1, max=MOST_SAMPLES, help="how many; default: eight of each class, or four texts"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=MOST_SEED, help="another seed, other samples")
    ] = 0,
    prompt: Annotated[
        str, typer.Option("--prompt", help="causal and recurrent text models: what to continue")
    ] = "",
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", min=1, max=MOST_TOKENS, help="causal and recurrent text models: how many to add"
        ),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0, max=1000)] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.01, max=1)] = 0.95,
    chat: Annotated[
        str | None, typer.Option("--chat", help="finetuned models: print the answer to this message")
    ] = None,
) -> None:
    """Write samples of a run's last commit to a file: images, or text. Or print an answer."""
    if chat is not None:
        from lowmem.inference.chat import chat_run

        say(chat_run(run, chat, tokens, temperature, top_p, seed))
        return
    from lowmem.inference.generate import TextSettings, sample_run

    say(f"wrote {sample_run(run, out, num, seed, TextSettings(prompt, tokens, temperature, top_p))}")


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(help="a new folder")],
    merge: Annotated[
        bool, typer.Option("--merge", help="of an adapter: the whole model with the adapter in its weights")
    ] = False,
) -> None:
    """Write a run's weights as ordinary safetensors files."""
    from lowmem.inference.export import export_run

    say(f"wrote {export_run(run, out, merge)}")


@app.command()
def verify(run: RunArgument, as_json: JsonOption = False) -> None:
    """Read everything in a run folder and say what is whole, damaged or missing. Changes nothing.

    Exits with 1 unless all is whole.
    """
    from lowmem.blocks.verify import verify_run

    found = verify_run(run)
    if as_json:
        say_json(found)
    else:
        say(f"{run}: {'whole' if found['whole'] else 'NOT WHOLE'}")
        for row in found["files"]:
            say(f"  {row['state']:<9} {row['part']:<10} {row['file']}  {row['found']}".rstrip())
    if not found["whole"]:
        raise typer.Exit(1)


@app.command()
def recover(run: RunArgument) -> None:
    """Go back one commit, and say what is lost. The same train command then goes on from there."""
    from lowmem.blocks.verify import recover_run

    found = recover_run(run)
    say(f"{run}: back at the commit after {counted(found['visits_done'], 'visit')}; lost: {found['lost']}")


@app.command()
def env(as_json: JsonOption = False) -> None:
    """Versions and hardware of this machine."""
    from lowmem.machine.environment import read_environment

    environment = read_environment()
    if as_json:
        say_json(environment)
        return
    for name, value in {**environment, **environment.pop("packages")}.items():
        say(f"{name:<16} {value}")


def main() -> NoReturn:
    """Runs the command line and exits with the code of its outcome."""
    atexit.register(gc.freeze)  # nor does the interpreter's end look for garbage among what was imported
    open_streams()
    with interruptible():
        code = _outcome()
    sys.exit(flushed(code))


def _outcome() -> int:
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except LowmemError as error:
        if isinstance(error, BudgetError) and error.table:
            say(error.table)
        complain(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        with contextlib.suppress(OSError):
            words = "interrupted: what is committed is kept; run the same command again to go on"
            print(words, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read what `say` does not print has gone
        return 1
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error of the command line itself
        if show is None:
            complain(unforeseen(error))
            return 1
        show()
        return 2
