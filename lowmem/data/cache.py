"""Files that are made once from the data and kept in $XDG_CACHE_HOME/lowmem (default: ~/.cache/lowmem).

A file there is always whole. Its name is a digest of all that it was made from, so it never goes stale.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from lowmem.data.identity import Fingerprint
from lowmem.errors import DataError


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowmem"


def digest(*facts: Any) -> str:
    """The stem of a file's name, from values that JSON can hold."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def file_facts(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """(path, bytes, time of the last change in ns) of each file: one of them changes when the file does."""
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def content_facts(paths: Iterable[Path]) -> list[tuple[str, int, int, str]]:
    """`file_facts` with the fingerprint of each content, as a run's identity has it.

    An edit that keeps size and time changes that; one within a very large file, where the fingerprint looks
    at spots, changes the time. Raises DataError.
    """
    return [(*facts, _content(Path(facts[0]))) for facts in file_facts(paths)]


def _content(path: Path) -> str:
    mark = Fingerprint()
    mark.file("content", path)
    return mark.hexdigest()


def cached(path: Path, parts: Callable[[], Iterable[bytes]]) -> Path:
    """Returns `path`, after writing the file from `parts` if it is not there.

    One process writes while others wait. A failed write leaves no file. Raises DataError when the folder
    cannot be written.
    """
    if path.exists():
        return path
    temporary = Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():  # another process wrote it while this one waited
                return path
            try:
                with open(temporary, "wb") as file:
                    file.writelines(parts())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as problem:
        raise DataError(
            f"data cache {path.parent}: {problem}; mend this, or set XDG_CACHE_HOME to a folder with room"
        ) from None
    return path
