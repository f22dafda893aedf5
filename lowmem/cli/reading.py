"""The verbs that read a run folder."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from lowmem.cli.common import JsonOption, RunArgument, app
from lowmem.terminal import say, say_json
from lowmem.units import counted

MOST_SEED = 2**63 - 1  # as of a recipe
MOST_SAMPLES, MOST_TOKENS = 100_000, 1_000_000  # of one file; each sample is in memory until it is written


@app.command()
def status(
    run: RunArgument,
    watch: Annotated[bool, typer.Option("--watch", help="redraw until the run stops")] = False,
    web: Annotated[
        bool, typer.Option("--web", help="serve the run's page on this machine, until interrupted")
    ] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="of --web; default: any")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Show where a run stands, from any terminal, also after it died."""
    import shutil

    from lowmem.reporting import dashboard
    from lowmem.reporting.report import read_status

    if web:
        from lowmem.reporting.web import PageServer

        with PageServer(run, port) as server, contextlib.suppress(KeyboardInterrupt):
            say(f"{server.url} shows {run}, on this machine alone; Ctrl-C ends it")
            sys.stdout.flush()
            server.serve_forever()
    elif as_json:
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

    metrics = evaluate_run(run, data, lambda line, _: say(line, sys.stderr))
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
