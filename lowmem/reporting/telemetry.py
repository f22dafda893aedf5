"""Where every byte is, while it is there: a monitor on its own thread, and a record of it in
`telemetry.jsonl`.

Three sources, each optional: psutil (this process, the machine), NVML (the card, every process on it),
torch's allocator. Each NVML call may fail on its own (unified-memory parts report NOT_SUPPORTED); what cannot
be read is None, never 0. Anonymous resident memory (rss less shared and file pages) is what a limit kills
for, so that is what counts on the host.
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

Listener = Callable[[dict[str, Any]], None]  # is given every record as it is written


class Recorder:
    """Appends one JSON object a line.

    Lines are not fsynced, and one that finds no space is dropped: telemetry may lose lines, never the run.
    """

    def __init__(self, path: Path) -> None:
        self._torn = _last_byte(path) not in (b"", b"\n")
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._lock = threading.Lock()  # the trainer and the writer's thread both record
        self.listeners: list[Listener] = []

    def write(self, event: str, **fields: Any) -> None:
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
    """The records of a run, oldest first; a line torn by a kill is passed over."""
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
