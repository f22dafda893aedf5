"""Reads a run's telemetry as curves: memory and loss over the time and the steps of training."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from lowmem.blocks.run_dir import RunDir
from lowmem.machine.monitor import device_bytes
from lowmem.reporting.telemetry import read_records


@dataclass
class History:
    """Curves of a run. The first four lists have one entry for each step.

    Seconds count training alone: the time between two processes of a run does not count.
    """

    seconds: list[float] = field(default_factory=list)
    device_bytes: list[float] = field(default_factory=list)
    host_bytes: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    # block (None: all together) -> step at which a visit ended -> mean loss of that visit
    losses: dict[int | None, dict[int, float]] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)  # step of a block -> learning rate
    environment: dict[str, Any] = field(default_factory=dict)  # of the latest process
    note: str = ""  # about lines that were left out


def read_history(run_dir: str | os.PathLike[str], unified: bool) -> History:
    """The history of a run. `unified`: device and host are one memory.

    Lines that are no records are left out, and counted in `note`.
    """
    history, visit, before, elapsed = History(), dict[str, Any](), None, 0.0
    records = read_records(RunDir(run_dir).telemetry_path)
    for record in records:
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        now, event = numbers.get("time"), record.get("event")
        if now is None:
            continue
        elapsed += 0.0 if before is None or event == "open" else max(now - before, 0.0)
        before = now
        if event == "open" and isinstance(record.get("environment"), dict):
            history.environment = record["environment"]
        elif event == "visit":
            visit = numbers
        elif event == "step":
            history.seconds.append(elapsed)
            history.host_bytes.append(numbers.get("host_bytes", 0))
            history.device_bytes.append(device_bytes(numbers, unified))
            if "lr" in numbers:
                history.rates[int(numbers["step"])] = numbers["lr"]
            history.step_s.append(numbers.get("step_s", 0.0))
        elif event == "visited" and visit.get("visit") == record.get("visit"):
            blocks = record.get("blocks") or [None]
            last = int(visit.get("first_step", 0) + visit.get("num_steps", 0))
            losses = history.losses.setdefault(blocks[0] if len(blocks) == 1 else None, {})
            losses[last] = numbers.get("loss", 0.0)
    history.note = records.note
    return history
