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
from lowmem.files import finite, json_lines, open_append

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


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a run, oldest first. No file means no records.

    Skips lines that are no records: a kill has torn them, or they are longer than a record ever is. Raises
    StoreError where something else than a file that can be read lies there.
    """
    return (record for record in json_lines(path, StoreError) if record is not None)
