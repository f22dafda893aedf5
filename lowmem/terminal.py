"""What the command line owes its terminal: safe text, streams that are open, interrupts, faults in one line.

What is printed may come from a file of anyone: control characters are escaped, and what a terminal or a pipe
cannot encode is replaced. Streams may be closed, full, or a pipe whose reader has gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO

from lowmem.units import finite, shown

_interrupted = threading.Event()


def say(text: str, file: TextIO | None = None) -> None:
    """Prints lines (`file` None: to stdout), with everything in them escaped that a terminal would obey."""
    _print("\n".join(shown(line, sys.maxsize) for line in text.split("\n")), file)


def say_json(content: Any) -> None:
    _print(json.dumps(finite(content), indent=1, allow_nan=False))


def _print(text: str, file: TextIO | None = None) -> None:
    """Prints. A reader of stdout that has gone, as `| head` does, has what it wanted: the rest is dropped."""
    try:
        print(text, file=file)
    except BrokenPipeError:
        if file is not None:
            raise
        _drop_output()


def _drop_output() -> None:
    """Makes stdout the null device, or the interpreter's end would try again to write what is left."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_warning(record: dict[str, Any]) -> None:
    """A listener that says warnings where there is no live view."""
    if record["event"] == "warning":
        print(f"warning: {record['message']}", file=sys.stderr, flush=True)


def _interrupt(signum: int, frame: object) -> NoReturn:
    _interrupted.set()
    raise KeyboardInterrupt


def stop_if_interrupted(record: dict[str, Any]) -> None:
    """A listener that raises an interrupt again at the next step.

    Python drops a KeyboardInterrupt that arrives within a finalizer or a weak reference's callback.
    """
    if _interrupted.is_set() and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, so that a write under way ends first.

    A shutdown is an interrupt too. The handlers that were there before are put back.
    """
    _interrupted.clear()
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_streams() -> None:
    """Makes stdout and stderr streams that any text can be written to.

    One that was closed becomes the null device: else the next file that is opened takes its number, and what
    libraries print would land in it, and Python prints to stdout what is meant for a stderr that is None.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            handle = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, open(handle, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115
        elif number and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        os.write(2, b"")
    except OSError:  # it is open, for reading alone: progress that cannot be shown must not end a run
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)


def flushed(code: int) -> int:
    """`code`, or 1 where what was printed cannot be delivered: a full disk, or a reader that is gone."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as problem:
        _drop_output()
        if not isinstance(problem, BrokenPipeError):
            complain(f"standard output: {problem}; what was to be printed is lost")
            return code or 1
    return code


def complain(message: str) -> None:
    """Prints one line to stderr. There is nowhere to say that it cannot be written."""
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {message}", file=sys.stderr, flush=True)


def unforeseen(error: Exception) -> str:
    """One line about a fault of lowmem itself, whose traceback is kept in a file of its own.

    The file is no part of a run folder: that may be somebody's who only lets it be read.
    """
    what = f"lowmem met what it does not foresee, {type(error).__name__}: {shown(error, 200)}"
    try:
        handle, path = tempfile.mkstemp(prefix="lowmem-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(traceback.format_exception(error))
    except OSError as problem:
        return f"{what}; its traceback cannot be kept ({problem.strerror})"
    return f"{what}; commits are kept; the traceback is in {path}: please report it with this command"
