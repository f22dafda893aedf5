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


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a run, oldest first. Skips lines that a kill has torn; no file means no records."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                yield record
