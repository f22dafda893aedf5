"""OpenMP's threads sleep soon, unless the user has decided otherwise, before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lowmem.machine.openmp import TURNS, USERS_OWN, VARIABLE

SAID = f"""
import atexit, os, sys
from lowmem.cli import main

atexit.register(lambda: print(os.environ.get({VARIABLE!r}), "torch" in sys.modules))
sys.argv = ["lowmem", "--version"]
main()
"""


def said(**settings: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in USERS_OWN}
    environment = {**kept, "PYTHONPATH": os.pathsep.join(sys.path), **settings}
    command = [sys.executable, "-c", SAID]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.splitlines()[-1]


def test_the_command_line_sets_it_before_torch_is_imported() -> None:
    assert said() == f"{TURNS} False"


@pytest.mark.parametrize("name", USERS_OWN)
def test_what_the_user_has_set_stays(name: str) -> None:
    assert said(**{name: "7"}) == ("7 False" if name == VARIABLE else "None False")
