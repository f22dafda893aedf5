"""What a terminal of 80 columns, a narrow one, one without colour, and a file are given."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def in_terminal(columns: int, *arguments: str, **environment: str) -> str:
    """What a command prints in a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    clean = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "lowmem", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**clean, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environment},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        shown += more
    os.close(ours)
    assert process.wait(timeout=60) == 0, shown
    return shown.decode()


@pytest.mark.parametrize("columns", [80, 50])
def test_a_report_fits_the_terminal_and_words_stay_whole(trained: Path, columns: int) -> None:
    shown = in_terminal(columns, "report", str(trained)).replace("\r", "")
    prose = shown[shown.index("progress ") :]
    assert all(len(line) <= max(columns, 11 + 64) for line in prose.splitlines())
    plain = subprocess.run(
        [sys.executable, "-m", "lowmem", "report", str(trained)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.split() == plain.split() if columns == 80 else prose.split()[-1] == plain.split()[-1]
    assert any(len(line) > 100 for line in plain.splitlines()), "in a file a note is one line"


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
@pytest.mark.parametrize("verb", ["status", "report", "--help"])
def test_nothing_is_coloured(trained: Path, verb: str, environment: dict[str, str]) -> None:
    arguments = [verb] if verb == "--help" else [verb, str(trained)]
    assert not COLOUR.search(in_terminal(80, *arguments, **environment))


def test_help_and_status_fit_40_columns(trained: Path) -> None:
    for line in in_terminal(40, "status", str(trained)).replace("\r", "").splitlines():
        assert len(line) <= 40
