"""Every error that a user can meet, and how its message is written.

    LowmemError                 exit 1, the run failed
     ├── TrainingError          exit 1, the loss is no longer a number
     ├── ShortageError          exit 1, the machine's memory ran short; commits are kept
     ├── StoreError             exit 1, a block file is missing, torn or not what was committed
     ├── ConfigError            exit 2, a recipe is wrong             (also ValueError)
     ├── ProfileError           exit 2, a machine profile is wrong    (also ValueError)
     ├── DataError              exit 2, the data are not what the recipe says
     ├── ResumeError            exit 2, the run folder belongs to another plan or process
     └── BudgetError            exit 3, the plan does not fit the profile

A message is one line: where - what was found - what is allowed - what to do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from os.path import commonprefix

from lowmem.units import shown

NUMBER = re.compile(r"\d{2,}")  # in a name: what tells machines apart
MOST_CHARACTERS = 600  # of a message; what it says fits, and what it quotes from a file may not


class LowmemError(Exception):
    """The root of the tree. The command line exits with `exit_code`.

    Whatever a message quotes, it stays one line that is safe to print.
    """

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message, MOST_CHARACTERS))


class TrainingError(LowmemError):
    pass


class ShortageError(LowmemError):
    pass


class StoreError(LowmemError):
    pass


class ConfigError(LowmemError, ValueError):
    exit_code = 2


class ProfileError(LowmemError, ValueError):
    exit_code = 2


class DataError(LowmemError):
    exit_code = 2


class ResumeError(LowmemError):
    exit_code = 2


class BudgetError(LowmemError):
    """The plan does not fit. `table`: the plan's table, which is printed above the message."""

    exit_code = 3

    def __init__(self, message: str, table: str = "") -> None:
        super().__init__(message)
        self.table = table


def nearest(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, then all known names."""
    names = sorted(known)
    close = _close(str(name), names)
    hint = f"did you mean '{close}'? " if close else ""
    return f"{hint}known: {', '.join(names)}"


def _close(name: str, known: list[str]) -> str | None:
    """The known name that begins alike, else the one with the same numbers, else the one of few edits.

    `rtx4060` and `RTX 4060` mean `rtx-4060-laptop-8gb`, which is fewer edits away from other cards. `bf16`
    means `bfloat16` and not `float16`, which begins with another letter.
    """
    plain, numbers = _plain(name), set(NUMBER.findall(name))
    alike = [other for other in known if plain and _plain(other).startswith(plain)]
    if not alike and numbers:
        alike = [other for other in known if numbers <= set(NUMBER.findall(other))]
    if alike:
        return min(alike, key=lambda other: (-len(commonprefix([plain, _plain(other)])), len(other)))
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))
