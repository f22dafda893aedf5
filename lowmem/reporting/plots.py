"""Draws the plots of a run's page, as SVG.

Each plot is drawn twice, for wide and for narrow pages; the page shows one of them. Lines and words take the
colour of the page's text. Only numbers, category names and run names reach matplotlib, which escapes them and
takes none of them for a formula. Needs matplotlib (extra `plots`).
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from lowmem.errors import ConfigError
from lowmem.reporting.history import History
from lowmem.reporting.report import Report
from lowmem.units import GIB, MIB, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 800  # in a line over time: each point is the highest of its share of the records
FAR = 2.5  # a budget above so many times the peak is not drawn: it would flatten everything else
WIDE, NARROW = 9.0, 4.2  # inches
INK = "#123456"  # stands for the colour of the page's text
COLOURS = (
    "#4c78a8",
    "#f58518",
    "#54a24b",
    "#e45756",
    "#72b7b2",
    "#b279a2",
    "#9d755d",
    "#eeca3b",
    "#bab0ac",
    "#ff9da6",
)
BUDGET_COLOUR = COLOURS[3]
FLOOR = "runtime_floor"


def plot_style() -> AbstractContextManager[None]:
    """Fonts, axes and identifiers of all plots, while the `with` block runs.

    Raises ConfigError if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "plots: need matplotlib, which is not installed; allowed: any 3.8 or newer: "
            "pip install 'lowmem[plots]'"
        ) from None
    # text stays text, identifiers are the same in every drawing, and a "$" in a name starts no formula
    fixed: Any = {"svg.fonttype": "none", "svg.hashsalt": "lowmem", "text.parse_math": False}
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    clear = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    fixed |= dict.fromkeys(inked, INK) | dict.fromkeys(clear, "none")
    return matplotlib.rc_context(
        {**fixed, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )


def memory_plot(content: dict[str, Any], history: History, unified: bool) -> str:
    """Measured memory over time, on top of the plan's stacked categories, with the budget as a line."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        seconds, device = _thinned(history.seconds, history.device_bytes)
        end = max(seconds, default=1.0) or 1.0
        predicted = _stacked(axes, content["predicted"]["by_category"], end)
        axes.plot(seconds, [value / GIB for value in device], color=INK, linewidth=1, label="measured")
        if not unified:
            seconds, host = _thinned(history.seconds, history.host_bytes)
            axes.plot(seconds, [value / GIB for value in host], color="grey", label="measured, host")
        budget = content["budget"]["device_bytes"] / GIB
        top = 1.15 * max([predicted, *device]) / GIB
        if budget > FAR * top:
            axes.plot([], [], color=BUDGET_COLOUR, linestyle="--", label=f"budget {budget:.1f} GiB, above")
        else:
            axes.axhline(budget, color=BUDGET_COLOUR, linestyle="--", label="budget")
            top = max(top, 1.05 * budget)
        axes.set(xlabel="seconds of training", ylabel="GiB", ylim=(0, top), xlim=(0, end))
        _legend(figure, axes)

    return _plot("memory over time against the plan and the budget", 3.4, draw)


def _stacked(axes: Axes, categories: dict[str, int], end: float) -> int:
    """Draws the categories on one another, the last one (the runtime's floor) lowest. Returns their sum."""
    floor = 0
    for colour, category in zip(COLOURS[: len(categories)], reversed(categories), strict=True):
        top = floor + categories[category]
        label = category.replace("_", " ")
        axes.fill_between(
            [0, end], floor / GIB, top / GIB, color=colour, alpha=0.45, linewidth=0, label=label
        )
        floor = top
    return floor


def model_plot(content: dict[str, Any]) -> str:
    """What the model and its training take by the plan, on a scale of their own: without the runtime's floor,
    beside which a small model cannot be seen.
    """
    parts = {
        name.replace("_", " "): num_bytes / MIB
        for name, num_bytes in content["predicted"]["by_category"].items()
        if name != FLOOR and num_bytes
    }

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bars = axes.barh(list(parts), list(parts.values()), color=COLOURS[0])
        axes.bar_label(bars, [f"{value:,.1f}" for value in parts.values()], padding=3)
        axes.margins(x=0.15)
        axes.set(xlabel="MiB on the device")
        axes.invert_yaxis()

    return _plot("what the model takes on the device, by category", 0.8 + 0.22 * len(parts), draw)


def peaks_plot(content: dict[str, Any]) -> str:
    """Predicted and measured peaks of device, host and disk, each with its budget where that is near."""
    keys = {"device": "device_peak_bytes", "host": "host_peak_bytes", "disk": "disk_bytes"}

    def draw(figure: Figure) -> None:
        for axes, (pool, key) in zip(figure.subplots(1, 3, sharey=True), keys.items(), strict=True):
            predicted, measured = content["predicted"][key], content["measured"][key]
            allowed = content["budget"][f"{pool}_bytes"]
            sizes = [measured / GIB, predicted / GIB]
            axes.barh(["measured", "predicted"], sizes, color=[COLOURS[1], COLOURS[0]])
            if allowed is not None and allowed < 3 * max(predicted, measured, 1):
                axes.axvline(allowed / GIB, color=BUDGET_COLOUR, linestyle="--")
            axes.set(title=pool, xlabel="GiB")
            axes.locator_params(axis="x", nbins=3)
        figure.tight_layout()

    return _plot("predicted and measured peaks", 1.8, draw)


def losses_plot(names: Sequence[str], histories: Sequence[History], kinds: Sequence[str]) -> str:
    """The mean loss of each visit over the block's own steps, with one pair of axes for each kind of loss.

    `kinds`: of each run. One run has a colour for each block; several runs have a colour each, and their
    later blocks fade.
    """
    return _plot("loss by steps", 3.0 * len(set(kinds)), lambda f: _draw_losses(f, names, histories, kinds))


def losses_svg(names: Sequence[str], histories: Sequence[History], kinds: Sequence[str]) -> str:
    """`losses_plot` as one SVG, for a file of its own on a white ground."""
    height = 3.0 * len(set(kinds))
    drawn = _svg("loss by steps", WIDE, height, lambda f: _draw_losses(f, names, histories, kinds))
    return drawn.replace("<svg ", '<svg style="background: white; color: black" ', 1)


def _draw_losses(
    figure: Figure, names: Sequence[str], histories: Sequence[History], kinds: Sequence[str]
) -> None:
    known = list(dict.fromkeys(kinds))
    for axes, kind in zip(figure.subplots(len(known), 1, squeeze=False)[:, 0], known, strict=True):
        for place, (name, history) in enumerate(zip(names, histories, strict=True)):
            if kinds[place] == kind:
                _draw_loss(axes, name, history, place if len(names) > 1 else None)
        axes.set(xlabel="steps of the block", ylabel="loss", title=kind if len(known) > 1 else "")
        if axes.lines:
            _legend(figure, axes)
    figure.tight_layout()


def _draw_loss(axes: Axes, name: str, history: History, place: int | None) -> None:
    for block, losses in sorted(history.losses.items(), key=_place_of):
        label = " ".join(filter(None, [name, "" if block is None else f"block {block}"])) or "loss"
        label = f"\u200b{label}" if label.startswith("_") else label  # else matplotlib leaves it out
        colour = COLOURS[((block or 0) if place is None else place) % len(COLOURS)]
        fading = 1 / (1 + 0.3 * (block or 0))
        axes.plot(list(losses), list(losses.values()), color=colour, marker=".", alpha=fading, label=label)


def _place_of(item: tuple[int | None, object]) -> int:
    return -1 if item[0] is None else item[0]


def pace_plot(history: History, batch_size: int) -> str:
    """The learning rate over steps, and the samples of a second over time."""

    def draw(figure: Figure) -> None:
        rates, speeds = figure.subplots(1, 2)
        steps = sorted(history.rates)
        xs, values = _thinned(list(map(float, steps)), [history.rates[step] for step in steps])
        rates.plot(xs, values, color=COLOURS[0], linewidth=1)
        rates.set(title="learning rate", xlabel="steps of the block", ylim=(0, None))
        made = [batch_size / taken if taken else 0.0 for taken in history.step_s]
        seconds, values = _thinned(history.seconds, made)
        speeds.plot(seconds, values, color=COLOURS[2], linewidth=1)
        speeds.set(title="samples/s", xlabel="seconds of training", ylim=(0, None))
        figure.tight_layout()

    return _plot("learning rate over steps, and samples per second over time", 2.2, draw)


def time_plot(time: dict[str, float]) -> str:
    """One bar of the run's seconds, by what they went to."""
    parts = {
        "compute": time["compute_s"],
        "exposed transfer": time["exposed_transfer_s"],
        "commits": time["commit_s"],
    }
    parts["other"] = max(time["total_s"] - sum(parts.values()), 0.0)

    def draw(figure: Figure) -> None:
        axes, left = figure.subplots(), 0.0
        for colour, (part, seconds) in zip(COLOURS, parts.items(), strict=False):
            axes.barh([""], [seconds], left=[left], color=colour, label=f"{part} {format_seconds(seconds)}")
            left += seconds
        axes.set(xlabel="seconds")
        columns = 2 if _is_narrow(figure) else 4
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, frameon=False)

    return _plot("seconds of the run by what they went to", 1.1, draw)


def compared_peaks_plot(names: Sequence[str], reports: Sequence[Report]) -> str:
    """Predicted and measured peaks on the device, one pair of bars for each run."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for offset, kind, colour in ((0.2, "predicted", COLOURS[0]), (-0.2, "measured", COLOURS[1])):
            values = [report.content[kind]["device_peak_bytes"] / GIB for report in reports]
            places = [place + offset for place in range(len(names))]
            axes.barh(places, values, height=0.4, color=colour, label=f"{kind} peak on the device")
        axes.set(yticks=range(len(names)), yticklabels=list(names), xlabel="GiB")
        axes.invert_yaxis()
        _legend(figure, axes)

    return _plot("predicted and measured peaks of the runs", 0.8 + 0.5 * len(names), draw)


# ------------------------------------------------------------------------------------------------------------

Draw = Callable[["Figure"], None]


def _plot(title: str, height: float, draw: Draw) -> str:
    """The drawing for wide and for narrow pages; the page's style shows one of them."""
    return "".join(
        f'<div class="{name}">{_svg(title, width, height, draw)}</div>'
        for name, width in (("wide", WIDE), ("narrow", NARROW))
    )


def _svg(title: str, width: float, height: float, draw: Draw) -> str:
    """The drawing as an SVG element, without XML prolog and date."""
    from matplotlib.figure import Figure

    figure, buffer = Figure(figsize=(width, height)), io.StringIO()
    draw(figure)
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def _is_narrow(figure: Figure) -> bool:
    return bool(figure.get_figwidth() < WIDE)


def _legend(figure: Figure, axes: Axes) -> None:
    """Beside the axes, or on a narrow page below them."""
    if _is_narrow(figure):
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2, frameon=False)
    else:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _thinned(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points; each has the highest y of its share."""
    size = -(-len(xs) // MAX_POINTS) or 1
    return xs[::size], [max(ys[start : start + size]) for start in range(0, len(ys), size)]
