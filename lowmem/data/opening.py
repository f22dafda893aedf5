"""Reaches the user's files: whatever is wrong with a path, a name or a disk becomes a DataError of one line.

Only regular files are opened. A pipe or a device in place of a file is refused before it is waited for.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lowmem.errors import DataError

AnyPath = str | Path


@contextmanager
def reaching(where: str, cure: str) -> Iterator[None]:
    """What the system refuses (OSError) or cannot even ask for (NUL, surrogates) becomes a DataError."""
    try:
        yield
    except OSError as problem:
        raise DataError(f"{where}: {problem.strerror or problem}; {cure}") from None
    except ValueError as problem:
        said = "a character that no path has" if isinstance(problem, UnicodeError) else problem
        raise DataError(f"{where}: {said}; {cure}") from None


def look_at(path: AnyPath, where: str, cure: str) -> os.stat_result | None:
    """What lies at a path, links followed; None if nothing does. Raises DataError where none can look."""
    with reaching(where, cure):
        try:
            return os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None


def is_file(path: AnyPath, where: str, cure: str) -> bool:
    found = look_at(path, where, cure)
    return found is not None and not stat.S_ISDIR(found.st_mode)


def is_folder(path: AnyPath, where: str, cure: str) -> bool:
    found = look_at(path, where, cure)
    return found is not None and stat.S_ISDIR(found.st_mode)


def open_file(path: AnyPath, where: str, cure: str) -> BinaryIO:
    """A regular file. Raises DataError for anything else at the path, and where there is nothing."""
    with reaching(where, cure):
        _check_regular(os.stat(path))  # to open a device may already do something
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            _check_regular(os.fstat(handle))
        except OSError:
            os.close(handle)
            raise
        return os.fdopen(handle, "rb")


def _check_regular(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "a pipe or a device, where a file should be")
