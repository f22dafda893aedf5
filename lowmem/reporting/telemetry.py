"""Writes and reads `telemetry.jsonl`, the record of what happened in a run folder.

The trainer writes one JSON object a line: an event's name, the time, and the event's own fields. Listeners
get each record as it is written; the live view and the loggers are listeners.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lowmem.errors import StoreError
from lowmem.reporting.records import is_record

MOST_LINE_BYTES = 1024 * 1024  # of a record; the longest, with the environment, has some 2 KiB
Listener = Callable[[dict[str, Any]], None]  # called with every record as it is written


class Recorder:
    """Appends records to a file.

    Lines are not fsynced, and a line that finds no space is dropped: telemetry may lose lines, but it never
    stops a run.
    """

    def __init__(self, path: Path) -> None:
        # a killed process may have left half a line: the first record then starts on a line of its own
        self._torn = _last_byte(path) not in (b"", b"\n")
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._lock = threading.Lock()  # the trainer and the thread that writes blocks both record
        self.listeners: list[Listener] = []

    def write(self, event: str, **fields: Any) -> None:
        """Appends one record, and tells the listeners."""
        record = {"event": event, "time": round(time.time(), 4), **fields}
        line = (json.dumps(record) + "\n").encode()
        with self._lock:
            whole = b"\n" + line if self._torn else line
            with contextlib.suppress(OSError):
                self._torn = self._file.write(whole) != len(whole)
            for listener in self.listeners:
                listener(record)

    def close(self) -> None:
        self._file.close()


def _last_byte(path: Path) -> bytes:
    if not path.exists() or path.stat().st_size == 0:
        return b""
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


class Records:
    """The records of a run, oldest first; no file means no records.

    A line that a kill has torn, or that is no record of ours, is passed over and counted in `skipped`. A run
    folder may come from elsewhere: a line is read up to MOST_LINE_BYTES.
    """

    def __init__(self, path: Path, num_blocks: int | None = None) -> None:
        """`num_blocks`: of the run, where it is known: a record of other blocks is none of the run's."""
        self.path, self.num_blocks, self.skipped = path, num_blocks, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.skipped = 0
        if not self.path.is_file():
            return
        try:
            with open(self.path, "rb") as file:
                for line in iter(lambda: file.readline(MOST_LINE_BYTES), b""):
                    record = _record(line)
                    if record is not None and is_record(record, self.num_blocks):
                        yield record
                    else:
                        self.skipped += bool(line.strip())
        except OSError as problem:
            raise StoreError(f"{self.path}: {problem.strerror}; make it readable, or remove it") from None

    @property
    def note(self) -> str:
        """One line about what was skipped in the last reading; empty where nothing was."""
        if not self.skipped:
            return ""
        return f"{self.skipped} lines of {self.path.name} are torn or no records of this run: left out"


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_records(path: Path, num_blocks: int | None = None) -> Records:
    return Records(path, num_blocks)
