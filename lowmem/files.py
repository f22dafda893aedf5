"""Reads and writes single files of a folder that may come from anywhere, or lie on a failing disk.

Only regular files are opened. A link in the last place of a path is not followed, and a pipe or a device
neither blocks nor is read. What is read has a bound: bytes, and for JSON also depth, digits and count of
values. What is written appears as a whole, under a temporary name that nobody could have taken before. A
refusal of the system becomes one line with the path and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.errors import LowmemError
from lowmem.units import MIB, format_bytes, shown

MOST_BYTES = 64 * MIB  # of a JSON file: the state of 100,000 blocks takes half of that
MOST_DEPTH = 64  # of objects and lists within each other; ours are 6 deep
MOST_DIGITS = 40  # of a number; a 64-bit integer has 20
MOST_VALUES = 4_000_000
MOST_LINE_BYTES = MIB  # of a file with an object in each line
HELD = "/proc/self/fd/"
RESTORE = "restore it from a copy, or begin again in another --run-dir"
MEND = "the last commit is kept: mend this, then run the same command again"

# Windows knows none of these flags; it has no pipes in folders, and makes links for administrators only.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_SAFELY = _NO_LINK | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY, mode: int = 0o644) -> int:
    """A handle on a regular file, as `os.open` gives it. Raises OSError for all else that lies there."""
    check_path(path)
    # a handle that this process holds is named by a link of the system's own
    safely = _SAFELY & ~_NO_LINK if os.fspath(path).startswith(HELD) else _SAFELY
    try:
        handle = os.open(path, flags | safely, mode)
    except OSError as problem:
        if problem.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "found a link; allowed: a regular file") from None
        if problem.errno == errno.ENXIO:
            raise _irregular() from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _irregular()
    return handle


def _irregular() -> OSError:
    return OSError(errno.ENXIO, "found a folder, pipe or device; allowed: a regular file")


def check_path(path: str | os.PathLike[str]) -> None:
    """Raises OSError for a path that no system call takes: those would raise a ValueError."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        raise OSError(errno.EILSEQ, "found characters that no file name has") from None
    if b"\0" in name:
        raise OSError(errno.EINVAL, "found a NUL character in the path")


@contextlib.contextmanager
def refusals_of(path: str | os.PathLike[str], error: type[LowmemError], cure: str = MEND) -> Iterator[None]:
    """Turns the system's error about a file into an `error` of one line."""
    try:
        yield
    except OSError as problem:
        raise error(f"{printable(path)}: {problem.strerror or problem}; {cure}") from None


def printable(path: str | os.PathLike[str]) -> str:
    """A path as a message can hold it."""
    return shown(os.fspath(path), 300)


# ------------------------------------------------------------------------------------------------------------
# Reading


def read_bytes(
    path: Path, most_bytes: int, error: type[LowmemError], cure: str = RESTORE, *, missing_ok: bool = False
) -> bytes:
    """The whole of a regular file of at most `most_bytes`; with `missing_ok` none of a file that is not
    there. Raises `error`.
    """
    with refusals_of(path, error, cure):
        try:
            handle = open_regular(path)
        except FileNotFoundError:
            if missing_ok:
                return b""
            raise
        with os.fdopen(handle, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            # One byte more than it says, so that a file that grows is seen. A read of `most_bytes` would take
            # a buffer of that size first, where memory is what a run has least of.
            content = file.read(size + 1) if size <= most_bytes else b""
    if size > most_bytes or len(content) > size:
        raise error(
            f"{printable(path)}: found {format_bytes(size)}; allowed: {format_bytes(most_bytes)}; {cure}"
        )
    return content


def read_json(path: Path, error: type[LowmemError], most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises `error` where it holds none, or more than a file of ours can hold."""
    return json_object(read_bytes(path, most_bytes, error), path, error)


def json_object(content: bytes, path: Path, error: type[LowmemError], cure: str = RESTORE) -> dict[str, Any]:
    """The JSON object that the bytes of `path` are. Raises `error`."""
    try:
        found = json_value(content)
    except ValueError as problem:
        raise error(f"{printable(path)}: not readable as JSON ({problem}); {cure}") from None
    if not isinstance(found, dict):
        raise error(f"{printable(path)}: found {type(found).__name__}; expected an object; {cure}")
    return found


def json_value(content: bytes) -> Any:
    """What a JSON text holds. Raises ValueError, with a reason of one line, where it is no JSON or not small.

    NaN and Infinity are no JSON.
    """
    try:
        found = json.loads(
            content.decode("utf-8"), parse_int=_integer, parse_float=_float, parse_constant=_no_number
        )
    except RecursionError:
        raise ValueError(f"too deep; allowed: {MOST_DEPTH} levels") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    _check_extent(found)
    return found


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits; allowed: {MOST_DIGITS}")
    return int(text)


def _float(text: str) -> float:
    value = float(text) if len(text) <= 2 * MOST_DIGITS else math.inf
    if not math.isfinite(value):
        raise ValueError(f"a number that is too large or too long: {text[:20]}")
    return value


def _no_number(text: str) -> float:
    raise ValueError(f"found {text}; allowed: finite numbers")


def _check_extent(found: Any) -> None:
    """Without recursion, for what is looked at may be deep."""
    level, count, depth = [found], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > MOST_DEPTH:
            raise ValueError(f"too deep; allowed: {MOST_DEPTH} levels")
        if count > MOST_VALUES:
            raise ValueError(f"too many values; allowed: {MOST_VALUES}")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        level = inner


def json_lines(path: Path, error: type[LowmemError]) -> Iterator[dict[str, Any] | None]:
    """The JSON object in each line of a file, None for a line that holds none or is too long. No file has no
    lines. Raises `error` for something else than a file that can be read.
    """
    with refusals_of(path, error, RESTORE):
        try:
            handle = open_regular(path)
        except FileNotFoundError:
            return
        with os.fdopen(handle, "rb") as file:
            begins = True  # whether the next piece begins a line
            while piece := file.readline(MOST_LINE_BYTES):
                ends = piece.endswith(b"\n")
                if begins:
                    yield _object_or_none(piece)
                begins = ends


def _object_or_none(line: bytes) -> dict[str, Any] | None:
    try:
        found = json_value(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


# ------------------------------------------------------------------------------------------------------------
# Writing


def write_whole(
    path: Path,
    content: bytes,
    error: type[LowmemError],
    mark: str = "",
    *,
    sync_folder: bool = True,
    cure: str = MEND,
) -> None:
    """Replaces a file in one move: a reader, or whoever comes after a kill, sees the old one or the new.

    `mark` stands in the temporary file's name, which `is_temporary` knows. Without `sync_folder` the caller
    syncs the folder. Raises `error`; the old file is then still there.
    """
    with refusals_of(path, error, cure):
        check_path(path)
        temporary = path.with_name(f".{path.name}.{mark}-{secrets.token_hex(8)}.tmp")
        handle = open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the new name with none of its bytes
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        if sync_folder:
            fsync_dir(path.parent)


def is_temporary(name: str, target: str, mark: str | None = None) -> bool:
    """Whether `write_whole` made a file of this name on the way to `target`, with this mark (None: any)."""
    found_mark, dash, token = name.removeprefix(f".{target}.").removesuffix(".tmp").rpartition("-")
    whole = name == f".{target}.{found_mark}-{token}.tmp" and dash != "" and len(token) == 16
    return whole and set(token) <= set("0123456789abcdef") and mark in (None, found_mark)


def open_append(path: Path, error: type[LowmemError]) -> io.FileIO:
    """An unbuffered file whose writes go to its end. Raises `error`."""
    with refusals_of(path, error):
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        return os.fdopen(open_regular(path, flags), "ab", buffering=0)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, and waits until their names are on the disk. Raises OSError."""
    check_path(path)
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:  # or a power cut could take the folder with all that was committed in it
        fsync_dir(folder.parent)


def fsync_dir(path: Path) -> None:
    """Waits until the folder's names are on the disk. Raises OSError."""
    if os.name == "nt":  # Windows has no handle for a folder; its file system journals the names
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
