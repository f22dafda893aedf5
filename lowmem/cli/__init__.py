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
from typing import Annotated, NoReturn

import typer

from lowmem.cli import machine, reading, training
from lowmem.cli.common import app
from lowmem.errors import BudgetError, LowmemError
from lowmem.machine.openmp import rest_between_operations
from lowmem.terminal import complain, flushed, interruptible, open_streams, say, unforeseen

INTERRUPTED = 130
VERBS = (training, reading, machine)  # each module adds its verbs to `app` when it is imported


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
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    """Train models that do not fit: one block at a time, with a memory budget you can check."""
    # `local_rank`: the launcher `deepspeed` gives it to each process; the environment says the same
    if context.invoked_subcommand is None:
        say(context.get_help())


def main() -> NoReturn:
    """Runs the command line and exits with the code of its outcome."""
    atexit.register(gc.freeze)  # nor does the interpreter's end look for garbage among what was imported
    rest_between_operations()
    open_streams()
    with interruptible():
        code = _outcome()
    sys.exit(flushed(code))


def _outcome() -> int:
    try:
        code = app(standalone_mode=False, prog_name="lowmem")
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
