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
from lowmem.files import json_lines, open_append
from lowmem.reporting.records import is_record
from lowmem.units import counted, finite

Listener = Callable[[dict[str, Any]], None]  # called with every record as it is written


class Recorder:
    """Appends records to a file.

    Lines are not fsynced, and a line that finds no space is dropped: telemetry may lose lines, but it never
    stops a run.
    """

    def __init__(self, path: Path) -> None:
        """Raises StoreError where something else than a file that can be written lies there."""
        self._file = open_append(path, StoreError)
        # a killed process may have left half a line: the first record then starts on a line of its own
        self._torn = _last_byte(self._file.fileno()) not in (b"", b"\n")
        self._lock = threading.Lock()  # the trainer and the thread that writes blocks both record
        self.listeners: list[Listener] = []

    def write(self, event: str, **fields: Any) -> None:
        """Appends one record, and tells the listeners."""
        record = {"event": event, "time": round(time.time(), 4), **fields}
        line = (json.dumps(finite(record)) + "\n").encode()
        with self._lock:
            whole = b"\n" + line if self._torn else line
            with contextlib.suppress(OSError):
                self._torn = self._file.write(whole) != len(whole)
            for listener in self.listeners:
                listener(record)

    def close(self) -> None:
        self._file.close()


def _last_byte(file: int) -> bytes:
    size = os.fstat(file).st_size
    return os.pread(file, 1, size - 1) if size else b""


class Records:
    """The records of a run, oldest first; no file means no records.

    A line that a kill has torn, or that is no record of ours, is passed over and counted in `skipped`.
    Iteration raises StoreError where something else than a file that can be read lies there.
    """

    def __init__(self, path: Path, num_blocks: int | None = None) -> None:
        """`num_blocks`: of the run, where it is known: a record of other blocks is none of the run's."""
        self.path, self.num_blocks, self.skipped = path, num_blocks, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.skipped = 0
        for record in json_lines(self.path, StoreError):
            if record is not None and is_record(record, self.num_blocks):
                yield record
            else:
                self.skipped += 1

    @property
    def note(self) -> str:
        """One line about what was skipped in the last reading; empty where nothing was."""
        if not self.skipped:
            return ""
        return f"left out {counted(self.skipped, 'line')} of {self.path.name}: torn, or not of this run"


def read_records(path: Path, num_blocks: int | None = None) -> Records:
    return Records(path, num_blocks)
