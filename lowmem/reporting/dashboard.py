"""Shows a run while it goes: progress of each block, loss, memory against the budget, rate, time left.

`RunView` keeps the state of a run and draws it as lines. It is fed with telemetry records. They come from the
trainer in this process, or from `telemetry.jsonl` in another terminal (`lowmem status RUN --watch`). In a
terminal the lines are redrawn in place; a log file gets one line every few seconds.
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

from lowmem.blocks.order import BlockQueue
from lowmem.blocks.run_dir import RunDir
from lowmem.errors import MOST_CHARACTERS
from lowmem.machine.monitor import device_bytes
from lowmem.machine.profile import profile_from_dict
from lowmem.reporting.records import read_run
from lowmem.reporting.report import read_report, read_status
from lowmem.reporting.telemetry import Listener, read_records
from lowmem.units import format_bytes, format_seconds, shown

HEARTBEAT_S = 10.0  # longest silence of the plain view
REFRESH_PER_S = 4
RATE_STEPS = 200  # steps over which the rate is taken
SAYING = {
    "running": "running",
    "finished": "finished",
    "stopped": "stopped: run the same train command again to go on",
}
FAILED = "stopped by an error that the same command would meet again:"


class RunView:
    """The state of a run, as far as it was fed with records. `plan`: plan.json as a dict, of `read_run`."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.budget = plan["budget"]
        self.unified = profile_from_dict(plan["profile"], "plan.json: profile").unified
        self.num_blocks = plan["settings"]["num_blocks"]
        self.whole = plan["recipe"]["method"] == "end_to_end"
        queue = BlockQueue.of(plan["recipe"], self.num_blocks)
        self.visits_total, self.steps_total = queue.num_visits, queue.total_steps
        self.visits_done = 0
        self.steps = [0] * self.num_blocks
        self.losses: list[float | None] = [None] * self.num_blocks
        self.current: list[int] = []  # blocks that are being trained
        self.last: dict[str, Any] = {}  # the latest step's record
        self.peak_bytes = 0  # on the device, at the end of a step
        self.disk_bytes = 0
        self.waited_s, self.computed_s = 0.0, 0.0
        self.warning, self.advice, self.note, self.evaluation = "", "", "", ""
        self._moments: deque[float] = deque(maxlen=RATE_STEPS)  # when the latest steps ended

    def feed(self, record: dict[str, Any]) -> None:
        """Takes in one telemetry record."""
        event = record.get("event")
        if event == "open":
            self._moments.clear()  # time between processes is no training time
            self.visits_done = record["visits_done"]
        elif event == "visit":
            self.current = record["blocks"]
        elif event == "step":
            self.last = record
            self._moments.append(record["time"])
            for block in self.current:
                self.steps[block] = record["step"] + 1
                self.losses[block] = record.get("loss", self.losses[block])
            self.peak_bytes = max(self.peak_bytes, device_bytes(record, self.unified))
        elif event == "visited":
            for block in record["blocks"]:
                self.losses[block] = record["loss"]
            self.waited_s = record["exposed_transfer_s"] + record["commit_s"]
            self.computed_s = record["compute_s"]
        elif event == "warning":
            self.warning = record["message"]
        elif event == "evaluating":
            self.evaluation = record["message"]
        elif event == "commit":
            self.visits_done = record["visits_done"]
            self.disk_bytes = record.get("disk_bytes", 0)

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far; a step of a model trained end to end is a step of every block."""
        return max(self.steps) if self.whole else sum(self.steps)

    @property
    def rate(self) -> float | None:
        """Steps per second over the latest steps, None before there are two."""
        if len(self._moments) < 2 or self._moments[-1] <= self._moments[0]:
            return None
        return (len(self._moments) - 1) / (self._moments[-1] - self._moments[0])

    def lines(self, width: int) -> list[str]:
        """The run as lines of at most `width` characters."""
        bar_width = max(10, min(80, width - 48))
        lines = [self.headline(), *self._block_lines(bar_width), *self._pool_lines(bar_width)]
        if self.computed_s:
            share = self.waited_s / self.computed_s
            lines.append(f"  waiting   {format_seconds(self.waited_s)} for blocks, {share:.1%} of compute")
        if self.evaluation:
            lines.append(f"  {self.evaluation}")
        if self.advice:
            lines += textwrap.wrap(
                f"advice: {self.advice}", width, initial_indent="  ", subsequent_indent=" " * 10
            )
        if self.warning:
            lines.append(f"  warning: {self.warning}")
        if self.note:
            lines.append(f"  note: {self.note}")
        return [shown(line)[:width] for line in lines]

    def _block_lines(self, bar_width: int) -> Iterator[str]:
        per_block = self.steps_total if self.whole else self.steps_total // self.num_blocks
        for block, (steps, loss) in enumerate(zip(self.steps, self.losses, strict=True)):
            mark = ">" if block in self.current else " "
            bar = _bar(steps, per_block, bar_width)
            loss_text = "" if loss is None else f"loss {loss:.4f}"
            yield f"{mark} block {block:<3} [{bar}] {steps:>6}/{per_block} {loss_text}"

    def _pool_lines(self, bar_width: int) -> Iterator[str]:
        used = device_bytes(self.last, self.unified)
        pools = [("memory" if self.unified else "device", used, self.budget["device_bytes"])]
        if not self.unified:
            pools.append(("host", self.last.get("host_bytes", 0), self.budget["host_bytes"]))
        if self.budget["disk_bytes"] is not None:
            pools.append(("disk", self.disk_bytes, self.budget["disk_bytes"]))
        for name, used, allowed in pools:
            bar = _bar(used, allowed, bar_width)
            yield f"  {name:<9} [{bar}] {format_bytes(used)} of {format_bytes(allowed)}"

    def headline(self) -> str:
        """Visits, steps, rate and time left."""
        line = f"visit {self.visits_done}/{self.visits_total}, step {self.steps_done}/{self.steps_total}"
        rate = self.rate
        if rate is None:
            return line
        left_s = (self.steps_total - self.steps_done) / rate
        return f"{line}, {rate:.1f} steps/s, {format_seconds(left_s)} left"

    def summary(self) -> str:
        """The run as one line, for logs."""
        losses = " ".join("-" if loss is None else f"{loss:.3f}" for loss in self.losses)
        memory = f"{format_bytes(self.peak_bytes)} of {format_bytes(self.budget['device_bytes'])}"
        return f"{self.headline()}; loss by block {losses}; peak {memory}"


def _bar(done: float, total: float, width: int) -> str:
    filled = min(int(width * done / max(total, 1)), width)
    return "#" * filled + "." * (width - filled)


@contextlib.contextmanager
def live_view(run_dir: str | os.PathLike[str]) -> Iterator[Listener]:
    """Yields a listener for the trainer that draws on stderr.

    In a terminal it redraws the view in place. Elsewhere it prints a line every few seconds.
    """
    run, views = RunDir(run_dir), list[RunView]()
    console = Console(stderr=True, highlight=False)

    def view() -> RunView:
        if not views:  # made at the first record: before it a new run has no plan.json
            views.append(_view_of(run))
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
            print(f"warning: {shown(record['message'])}", file=sys.stderr, flush=True)
        if record["event"] == "evaluating":
            print(shown(record["message"]), file=sys.stderr, flush=True)
        if record["event"] == "trained" or (due and record["event"] in ("step", "visited")):
            printed = time.monotonic()
            print(view().summary(), file=sys.stderr, flush=True)

    yield log


def _view_of(run: RunDir) -> RunView:
    """The view of a run after all records so far, those of earlier processes included."""
    view = RunView(read_run(run)[0])
    records = read_records(run.telemetry_path, view.num_blocks)
    for record in records:
        view.feed(record)
    view.note = records.note
    return view


def status_lines(run_dir: str | os.PathLike[str], width: int) -> tuple[str, list[str]]:
    """(running | stopped | finished, the lines of the live view), from the files alone.

    Raises as `read_report`.
    """
    view, status = _view_of(RunDir(run_dir)), read_status(run_dir)
    view.advice = status["advice"] or ""
    view.visits_done = status["progress"]["visits_done"]
    for block in status["blocks"]:
        # steps after the last commit count while a process may still commit them
        seen = view.steps[block["block"]] if status["state"] == "running" else 0
        view.steps[block["block"]] = max(block["steps"], seen)
    seen_at = status["last"].get("time")
    age = f", last record {format_seconds(max(time.time() - seen_at, 0))} ago" if seen_at else ""
    lines = [shown(f"{status['run']}: {SAYING[status['state']]}{age}")[:width], *view.lines(width)]
    if status["failure"]:
        wrapped = textwrap.wrap(shown(status["failure"], MOST_CHARACTERS), width)
        lines[:1] = [shown(f"{status['run']}: {FAILED}{age}")[:width], *wrapped]
    return status["state"], lines


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
