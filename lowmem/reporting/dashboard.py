"""Shows a run while it goes: progress of each block, loss, memory against the budget, rate, time left.

`RunView` keeps the state of a run and draws it as lines. It is fed with telemetry records. They come from the
trainer in this process, or from `telemetry.jsonl` in another terminal (`lowmem status RUN --watch`). In a
terminal, and under a notebook's cell, the lines are redrawn in place; a log file gets one line every few
seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterator
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
from lowmem.reporting.tables import WIDTH, HtmlText
from lowmem.reporting.telemetry import Listener, read_records
from lowmem.units import format_bytes, format_seconds, shown

HEARTBEAT_S = 10.0  # longest silence of the plain view
REFRESH_PER_S = 4
LEAST_BAR = 4  # characters: a shorter bar tells nothing
RATE_STEPS = 200  # steps over which the rate is taken
SAYING = {
    "running": "running",
    "finished": "finished",
    "stopped": "stopped: run the same train command again to go on",
    "evaluating": "evaluating",
}
GOING = ("running", "evaluating")
FAILED = "stopped by an error that the same command would meet again:"


class RunView:
    """The state of a run, as far as it was fed with records. `plan`: plan.json as a dict, of `read_run`."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.budget = plan["budget"]
        self.unified = profile_from_dict(plan["profile"], "plan.json: profile").unified
        self.num_blocks = plan["settings"]["num_blocks"]
        self.whole = plan["recipe"]["method"] == "end_to_end"
        queue = BlockQueue.of(plan["recipe"], self.num_blocks)
        self.num_steps = queue.num_steps  # of each block
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
        self.evaluated = 0.0  # share of the present stage of the evaluation
        planned = plan["predicted"].get("evaluation") or {}
        self.evaluation_s: float | None = planned.get("seconds")  # by the plan
        self._moments: deque[float] = deque(maxlen=RATE_STEPS)  # when the latest steps ended

    def feed(self, record: dict[str, Any]) -> None:
        """Takes in one telemetry record."""
        event = record.get("event")
        if event == "open":
            self._moments.clear()  # time between processes is no training time
            self.evaluation = ""
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
            self.evaluation, self.evaluated = record["message"], record["share"]
        elif event == "evaluated":
            self.evaluation = ""
        elif event == "commit":
            self.visits_done = record["visits_done"]
            self.disk_bytes = record.get("disk_bytes", 0)

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far; a step of a model trained end to end is a step of every block."""
        return max(self.steps) if self.whole else sum(self.steps)

    @property
    def rate(self) -> float | None:
        """Optimizer steps per second over the latest steps, None before there are two."""
        if len(self._moments) < 2 or self._moments[-1] <= self._moments[0]:
            return None
        return (len(self._moments) - 1) / (self._moments[-1] - self._moments[0])

    def lines(self, width: int) -> list[str]:
        """The run as lines of at most `width` characters."""
        bar_width = min(80, width - 48) if width >= 58 else max(width - 40, 0)
        lines = [
            *wrapped(self.headline(), width),
            *self._block_lines(bar_width),
            *self._pool_lines(bar_width),
        ]
        if self.evaluation:
            lines.append(f"  {'evaluates':<9} {_bar(self.evaluated, 1, bar_width)}{self.evaluated:.0%}")
        if self.computed_s:
            share = self.waited_s / self.computed_s
            text = f"waiting   {format_seconds(self.waited_s)} for blocks, {share:.1%} of compute"
            lines += wrapped(text, width, 2, 12)
        for name in ("advice", "warning", "note"):
            if text := getattr(self, name):
                lines += wrapped(f"{name}: {text}", width, 2, 4 + len(name))
        return [line[:width] for line in lines]

    def _block_lines(self, bar_width: int) -> Iterator[str]:
        per_block = self.steps_total if self.whole else self.steps_total // self.num_blocks
        for block, (steps, loss) in enumerate(zip(self.steps, self.losses, strict=True)):
            mark = ">" if block in self.current else " "
            bar = _bar(steps, per_block, bar_width)
            loss_text = "" if loss is None else f"loss {loss:.4f}"
            yield f"{mark} block {block:<3} {bar}{steps:>6}/{per_block} {loss_text}"

    def _pool_lines(self, bar_width: int) -> Iterator[str]:
        used = device_bytes(self.last, self.unified)
        pools = [("memory" if self.unified else "device", used, self.budget["device_bytes"])]
        if not self.unified:
            pools.append(("host", self.last.get("host_bytes", 0), self.budget["host_bytes"]))
        if self.budget["disk_bytes"] is not None:
            pools.append(("disk", self.disk_bytes, self.budget["disk_bytes"]))
        for name, used, allowed in pools:
            bar = _bar(used, allowed, bar_width)
            yield f"  {name:<9} {bar}{format_bytes(used)} of {format_bytes(allowed)}"

    def headline(self) -> str:
        """Visits, steps, rate and time left. Steps are those of each block, as in `train.num_steps`."""
        if self.evaluation:
            return self.evaluation
        shares = 1 if self.whole else self.num_blocks
        of_each = "" if shares == 1 else f" of each of {shares} blocks"
        line = f"visit {self.visits_done}/{self.visits_total}"
        line += f", step {self.steps_done // shares}/{self.num_steps}{of_each}"
        rate, missing = self.rate, self.steps_total - self.steps_done
        if rate is None or not missing:
            return line
        then = "" if not self.evaluation_s else f", then {format_seconds(self.evaluation_s)} of evaluation"
        return f"{line}, {rate / shares:.1f} steps/s, {format_seconds(missing / rate)} left{then}"

    def summary(self) -> str:
        """The run as one line, for logs."""
        losses = " ".join("-" if loss is None else f"{loss:.3f}" for loss in self.losses)
        memory = f"{format_bytes(self.peak_bytes)} of {format_bytes(self.budget['device_bytes'])}"
        return f"{self.headline()}; loss by block {losses}; peak {memory}"


def _bar(done: float, total: float, width: int) -> str:
    """A bar with a space behind it, or nothing where there is no room for one."""
    filled = min(int(width * done / max(total, 1)), width)
    return f"[{'#' * filled}{'.' * (width - filled)}] " if width >= LEAST_BAR else ""


def wrapped(text: str, width: int, indent: int = 0, further: int = 0) -> list[str]:
    """`text` of any origin as lines that end between words; all but the first are indented by `further`."""
    safe = shown(text, MOST_CHARACTERS)
    return textwrap.wrap(safe, width, initial_indent=" " * indent, subsequent_indent=" " * further)


@contextlib.contextmanager
def live_view(run_dir: str | os.PathLike[str]) -> Iterator[Listener]:
    """Yields a listener for the trainer that draws on stderr, or under the cell of a notebook.

    In a terminal and in a notebook it redraws the view in place. Elsewhere it prints a line every few
    seconds.
    """
    run, views = RunDir(run_dir), list[RunView]()
    console = Console(stderr=True, highlight=False)

    def view() -> RunView:
        if not views:  # made at the first record: before it a new run has no plan.json
            views.append(_view_of(run))
        return views[0]

    if (cell := _cell()) is not None:
        yield _drawn_in(cell, view)
        return
    if console.is_terminal and not console.is_dumb_terminal:
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
        if record["event"] == "evaluating" and (due or record["share"] == 0):
            printed = time.monotonic()
            print(shown(record["message"]), file=sys.stderr, flush=True)
        if record["event"] == "trained" or (due and record["event"] in ("step", "visited")):
            printed = time.monotonic()
            print(view().summary(), file=sys.stderr, flush=True)

    yield log


def _cell() -> Callable[[HtmlText], Any] | None:
    """What redraws a place under the present cell, where this process is a notebook's."""
    library = sys.modules.get("IPython")
    if library is None or not hasattr(library.get_ipython(), "kernel"):
        return None
    handle = importlib.import_module("IPython.display").display(HtmlText(""), display_id=True)
    return getattr(handle, "update", None)


def _drawn_in(cell: Callable[[HtmlText], Any], view: Callable[[], RunView]) -> Listener:
    drawn = 0.0

    def draw(record: dict[str, Any]) -> None:
        nonlocal drawn
        view().feed(record)
        if record["event"] not in ("step", "evaluating") or time.monotonic() - drawn > 1 / REFRESH_PER_S:
            drawn = time.monotonic()
            cell(HtmlText("\n".join(view().lines(WIDTH))))

    return draw


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
    if status["state"] != "evaluating":
        view.evaluation = ""
    for block in status["blocks"]:
        # steps after the last commit count while a process may still commit them
        seen = view.steps[block["block"]] if status["state"] in GOING else 0
        view.steps[block["block"]] = max(block["steps"], seen)
    seen_at = status["last"].get("time")
    age = f", last record {format_seconds(max(time.time() - seen_at, 0))} ago" if seen_at else ""
    saying = SAYING[status["state"]] if status["failure"] is None else FAILED
    first = wrapped(f"{status['run']}: {saying}{age}", width)
    first += wrapped(status["failure"], width) if status["failure"] else []
    lines = [*first, *view.lines(width)]
    return status["state"], lines


def watch(run_dir: str | os.PathLike[str], period_s: float = 1.0) -> None:
    """Redraws `status_lines` until the run is no longer running."""
    console = Console(highlight=False)
    with Live(console=console, refresh_per_second=REFRESH_PER_S) as live:
        while True:
            state, lines = status_lines(run_dir, console.width)
            live.update(Text("\n".join(lines)))
            if state not in GOING:
                return
            time.sleep(period_s)
