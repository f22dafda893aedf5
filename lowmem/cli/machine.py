"""The verbs about machines, recipes and this installation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowmem.cli.common import JsonOption, app
from lowmem.errors import ConfigError
from lowmem.terminal import say, say_json


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
def env(as_json: JsonOption = False) -> None:
    """Versions and hardware of this machine."""
    from lowmem.machine.environment import read_environment

    environment = read_environment()
    if as_json:
        say_json(environment)
        return
    for name, value in {**environment, **environment.pop("packages")}.items():
        say(f"{name:<16} {value}")


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="where runs would be; default: this folder")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """What this machine can do, and what stands in the way, each with its cure. Exits with 1 at a fault."""
    from lowmem.doctor import examine, healthy, report
    from lowmem.reporting.tables import fitted

    if not folder.is_dir():
        raise ConfigError(f"{folder}: found no folder; give one that is there, or leave it out")
    findings = examine(folder)
    if as_json:
        say_json(report(findings))
    for each in findings if not as_json else ():
        cure = f"; {each.cure}" if each.cure else ""
        say(fitted(f"{each.state:<8}{each.name:<17}{each.found}{cure}", 8))
    if not healthy(findings):
        raise typer.Exit(1)
