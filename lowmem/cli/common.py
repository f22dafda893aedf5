"""What the verbs share: the application they join, and their common arguments and options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


def known(kind: str) -> Callable[[str], list[str]]:
    """What a shell completes a name to."""

    def complete(incomplete: str) -> list[str]:
        from lowmem.schema import names_in

        return [name for name in names_in(kind) if name.startswith(incomplete)]

    return complete


RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="a recipe's name (`lowmem recipes`) or the path of a YAML file; of train: or your data",
        autocompletion=known("recipes"),
    ),
]
RunArgument = Annotated[Path, typer.Argument(help="a run folder, as written by `lowmem train`")]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        help="a machine's name (`lowmem profiles`) or a YAML file; default: this machine",
        autocompletion=known("hardware"),
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
