"""Files made once from the data and kept: $XDG_CACHE_HOME/lowmem (~/.cache/lowmem), each whole or not there
at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from lowmem.errors import DataError


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowmem"


def digest(*facts: Any) -> str:
    """A file name's stem: of values that JSON can hold."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def file_facts(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """What changes when a file does: (path, bytes, time of its last change in ns)."""
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def cached(path: Path, parts: Callable[[], Iterable[bytes]]) -> Path:
    """`path`; if it is not there it is written from `parts`, whole or not at all, by one process while others
    wait.
    """
    if path.exists():
        return path
    temporary = Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():
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
