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
VERB = re.compile(r"^lowmem ([a-z]+)", re.MULTILINE)


def test_every_verb_that_the_readme_shows_is_tried() -> None:
    script: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "first_hour"))
    tried = {verb for each in script["TRIES"] for verb in VERB.findall(each.command)}
    assert set(VERB.findall((ROOT / "README.md").read_text(encoding="utf-8"))) <= tried


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
