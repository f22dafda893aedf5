"""A run as it goes: block strip, loss, memory against the budget, rate, time left. Live in a terminal, plain
lines elsewhere.

`RunView` turns telemetry records into lines; it does not care whether they come from the trainer in this
process or from `telemetry.jsonl` in another terminal (`lowmem status RUN --watch`).
"""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lowmem.blocks.run_dir import RunDir
from lowmem.reporting.report import queue_totals, read_report, read_status
from lowmem.reporting.telemetry import Listener, read_records
from lowmem.units import format_bytes, format_seconds

HEARTBEAT_S = 10.0  # longest silence of the plain view
REFRESH_PER_S = 4
RATE_STEPS = 200  # steps over which the rate is taken


class RunView:
    """State of a run, fed with records; `lines(width)` draws it."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.num_blocks = plan["settings"]["num_blocks"]
        self.whole = plan["recipe"]["method"] == "end_to_end"
        self.visits_total, self.steps_total = queue_totals(plan)
        self.visits_done = 0
        self.steps = [0] * self.num_blocks
        self.losses: list[float | None] = [None] * self.num_blocks
        self.current: list[int] = []
        self.last: dict[str, Any] = {}
        self.peak_bytes = 0
        self.disk_bytes = 0
        self.waited_s, self.computed_s = 0.0, 0.0
        self.warning, self.advice = "", ""
        self._moments: deque[float] = deque(maxlen=RATE_STEPS)

    def feed(self, record: dict[str, Any]) -> None:
        event = record.get("event")
        if event == "open":
            self._moments.clear()
            self.visits_done = record["visits_done"]
        elif event == "visit":
            self.current = record["blocks"]
        elif event == "step":
            self.last = record
            self._moments.append(record["time"])
            for block in self.current:
                self.steps[block] = record["step"] + 1
                self.losses[block] = record.get("loss", self.losses[block])
            self.peak_bytes = max(self.peak_bytes, self._device_bytes(record))
        elif event == "visited":
            for block in record["blocks"]:
                self.losses[block] = record["loss"]
            self.waited_s, self.computed_s = (
                record["exposed_transfer_s"] + record["commit_s"],
                record["compute_s"],
            )
        elif event == "warning":
            self.warning = record["message"]
        elif event == "commit":
            self.visits_done = record["visits_done"]
            self.disk_bytes = record.get("disk_bytes", 0)

    @property
    def steps_done(self) -> int:
        return max(self.steps) if self.whole else sum(self.steps)

    @property
    def rate(self) -> float | None:
        """Steps per second over the last steps."""
        if len(self._moments) < 2 or self._moments[-1] <= self._moments[0]:
            return None
        return (len(self._moments) - 1) / (self._moments[-1] - self._moments[0])

    def lines(self, width: int) -> list[str]:
        bar_width = max(10, min(80, width - 48))
        out = [self.headline()[:width]]
        per_block = self.steps_total if self.whole else self.steps_total // self.num_blocks
        for block in range(self.num_blocks):
            mark = ">" if block in self.current else " "
            loss = self.losses[block]
            loss_text = "" if loss is None else f"loss {loss:.4f}"
            out.append(
                f"{mark} block {block:<3} [{_fill(self.steps[block], per_block, bar_width)}] {self.steps[block]:>6}/{per_block} {loss_text}"[
                    :width
                ]
            )
        budget = self.plan["budget"]
        device, host = self._device_bytes(self.last), self.last.get("host_bytes", 0)
        unified = self.plan["profile"]["device"]["type"] != "cuda"
        pools = [("memory" if unified else "device", device, budget["device_bytes"])]
        if not unified:
            pools.append(("host", host, budget["host_bytes"]))
        if budget["disk_bytes"] is not None:
            pools.append(("disk", self.disk_bytes, budget["disk_bytes"]))
        for name, used, allowed in pools:
            out.append(
                f"  {name:<9} [{_fill(used, allowed, bar_width)}] {format_bytes(used)} of {format_bytes(allowed)}"[
                    :width
                ]
            )
        if self.computed_s:
            waited = f"  waiting   {format_seconds(self.waited_s)} for blocks, {self.waited_s / self.computed_s:.1%} of compute"
            out.append(waited[:width])
        out += (
            textwrap.wrap(
                f"advice: {self.advice}", width, initial_indent="  ", subsequent_indent="          "
            )
            if self.advice
            else []
        )
        return out + ([f"  warning: {self.warning}"[:width]] if self.warning else [])

    def headline(self) -> str:
        rate = self.rate
        left = (
            ""
            if rate is None
            else f", {rate:.1f} steps/s, {format_seconds((self.steps_total - self.steps_done) / rate)} left"
        )
        return (
            f"visit {self.visits_done}/{self.visits_total}, step {self.steps_done}/{self.steps_total}{left}"
        )

    def summary(self) -> str:
        """One line, for logs."""
        losses = " ".join("-" if loss is None else f"{loss:.3f}" for loss in self.losses)
        memory = f"{format_bytes(self.peak_bytes)} of {format_bytes(self.plan['budget']['device_bytes'])}"
        return f"{self.headline()}; loss by block {losses}; peak {memory}"

    def _device_bytes(self, record: dict[str, Any]) -> int:
        if self.plan["profile"]["device"]["type"] != "cuda":
            return int(record.get("host_bytes", 0))
        return int(record.get("nvml_process_bytes", record.get("device_reserved_bytes", 0)))


def _fill(done: float, total: float, width: int) -> str:
    filled = min(int(width * done / max(total, 1)), width)
    return "#" * filled + "." * (width - filled)


@contextlib.contextmanager
def live_view(run_dir: str | os.PathLike[str]) -> Iterator[Listener]:
    """A listener for the trainer that draws on stderr: redrawn in place in a terminal, else a line every few
    seconds.
    """
    run, views = RunDir(run_dir), list[RunView]()
    console = Console(stderr=True, highlight=False)

    def view() -> RunView:
        if not views:
            views.append(RunView(run.read_plan()))
            for record in read_records(run.telemetry_path):  # what earlier processes did
                views[0].feed(record)
        return views[0]

    if console.is_terminal:
        with Live(console=console, refresh_per_second=REFRESH_PER_S, transient=False) as live:

            def draw(record: dict[str, Any]) -> None:
                view().feed(record)
                if record["event"] == "commit":
                    view().advice = read_report(run_dir).content["stream"]["advice"] or ""
                live.update(Text("\n".join(view().lines(console.width))))

            yield draw
        return

    printed = 0.0

    def log(record: dict[str, Any]) -> None:
        nonlocal printed
        view().feed(record)
        due = time.monotonic() - printed > HEARTBEAT_S
        if record["event"] == "warning":
            print(f"warning: {record['message']}", file=sys.stderr, flush=True)
        if record["event"] == "trained" or (due and record["event"] in ("step", "visited")):
            printed = time.monotonic()
            print(view().summary(), file=sys.stderr, flush=True)

    yield log


def status_lines(run_dir: str | os.PathLike[str], width: int) -> tuple[str, list[str]]:
    """(running | stopped | finished, the same picture as the live view), from the files alone."""
    run = RunDir(run_dir)
    view = RunView(run.read_plan())
    for record in read_records(run.telemetry_path):
        view.feed(record)
    status = read_status(run_dir)
    view.advice = status["advice"] or ""
    view.visits_done = status["progress"]["visits_done"]
    for block in status["blocks"]:
        view.steps[block["block"]] = max(
            block["steps"], view.steps[block["block"]] if status["state"] == "running" else 0
        )
    seen = status["last"].get("time")
    age = f", last record {format_seconds(max(time.time() - seen, 0))} ago" if seen else ""
    what = {
        "running": "running",
        "finished": "finished",
        "stopped": "stopped: run the same train command again to go on",
    }[status["state"]]
    return status["state"], [f"{status['run']}: {what}{age}"[:width], *view.lines(width)]


def watch(run_dir: str | os.PathLike[str], period_s: float = 1.0) -> None:
    """Redraws `status_lines` until the run is no longer running."""
    console = Console(highlight=False)
    with Live(console=console, refresh_per_second=REFRESH_PER_S) as live:
        while True:
            state, lines = status_lines(run_dir, console.width)
            live.update(Text("\n".join(lines)))
            if state != "running":
                return
            time.sleep(period_s)
