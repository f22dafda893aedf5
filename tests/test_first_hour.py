"""The script of the first hour tries what the README shows; its fast part does as expected from a wheel."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"^lowmem ([a-z]+)([^#\n]*)", re.MULTILINE)
OPTION = re.compile(r"--[a-z-]+")


def commands(text: str) -> list[tuple[str, set[str]]]:
    """Verbs and their options, of lines that begin with a command."""
    return [(verb, set(OPTION.findall(rest))) for verb, rest in COMMAND.findall(text)]


def test_every_command_that_the_readme_shows_is_tried_with_its_options() -> None:
    script: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "first_hour"))
    lines = "\n".join(each.command for each in (*script["TRIES"], *script["CHAT_TRIES"]))
    tried, shown = commands(lines), commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(shown) > 20
    assert [
        one for one in shown if not any(one[0] == verb and one[1] <= options for verb, options in tried)
    ] == []


@pytest.mark.slow
def test_the_fast_part_of_the_first_hour_does_as_expected_from_a_wheel() -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts" / "first_hour"),
        "--fast",
        "--packages-of",
        sys.executable,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
