"""Writes what a person asked for by name (samples, a page, a profile): never over a file of a run."""

from __future__ import annotations

import os
from pathlib import Path

from lowmem.errors import ConfigError
from lowmem.files import write_whole
from lowmem.units import shown

RUN_FILES = ("plan.json", "state.json")  # a folder with one of them is a run's
RESULTS = (".txt", ".png", ".npy", ".html", ".svg")  # what may be written into a run's folder


def check_output(out: str | os.PathLike[str], option: str) -> Path:
    """The file that `out` names, where a file can be written. Raises ConfigError, before any work is done."""
    path, where = Path(out), f"{option} {shown(out, 200)}"
    try:
        target = path.resolve()
        if target.is_dir():
            raise ConfigError(f"{where}: found a folder; give the name of a file")
        if target.exists() and not target.is_file():
            raise ConfigError(f"{where}: found no ordinary file; give the name of a file")
        if not target.parent.is_dir():
            raise ConfigError(f"{where}: No such file or directory; make its folder, or give another")
        if not os.access(target.parent, os.W_OK):
            raise ConfigError(f"{where}: its folder cannot be written; give a file in another folder")
        of_run = any((target.parent / name).exists() for name in RUN_FILES)
    except ConfigError:
        raise  # it is a ValueError too
    except (OSError, ValueError, RuntimeError) as problem:
        raise ConfigError(
            f"{where}: {getattr(problem, 'strerror', None) or problem}; give the name of a file"
        ) from None
    if of_run and target.suffix not in RESULTS:
        raise ConfigError(
            f"{where}: found a run's folder, whose files are left as they are; allowed there: names that end "
            f"in {', '.join(RESULTS)}; give another name"
        )
    return target


def write_output(out: str | os.PathLike[str], data: bytes, option: str) -> Path:
    """Writes the file whole, or leaves what was there. Returns `out`. Raises ConfigError."""
    target = check_output(out, option)
    cure = "give a file in a folder that can be written"
    write_whole(target, data, ConfigError, sync_folder=False, cure=cure)
    return Path(out)
