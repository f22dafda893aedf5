"""Draws the plots of a run's page, each as the text of one SVG.

Only numbers, category names and run names reach matplotlib, which escapes them and takes none of them for a
formula. Needs matplotlib (extra `plots`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from lowmem.errors import ConfigError
from lowmem.reporting.history import History
from lowmem.reporting.report import Report
from lowmem.units import GIB, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 800  # in a line over time: each point is the highest of its share of the records
FAR = 2.5  # a budget above so many times the peak is not drawn: it would flatten everything else
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
    return matplotlib.rc_context(
        {**fixed, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )


def memory_plot(content: dict[str, Any], history: History, unified: bool) -> str:
    """Measured memory over time, on top of the plan's stacked categories, with the budget as a line."""
    figure, axes = _figure(9, 3.4)
    seconds, device = _thinned(history.seconds, history.device_bytes)
    end = max(seconds, default=1.0) or 1.0
    predicted = _stacked(axes, content["predicted"]["by_category"], end)
    axes.plot(seconds, [value / GIB for value in device], color="black", linewidth=1, label="measured")
    if not unified:
        seconds, host = _thinned(history.seconds, history.host_bytes)
        axes.plot(seconds, [value / GIB for value in host], color="grey", linewidth=1, label="measured, host")
    budget = content["budget"]["device_bytes"] / GIB
    top = 1.15 * max([predicted, *device]) / GIB
    if budget > FAR * top:
        axes.plot([], [], color=BUDGET_COLOUR, linestyle="--", label=f"budget {budget:.1f} GiB, above")
    else:
        axes.axhline(budget, color=BUDGET_COLOUR, linestyle="--", label="budget")
        top = max(top, 1.05 * budget)
    axes.set(xlabel="seconds of training", ylabel="GiB", ylim=(0, top), xlim=(0, end))
    _legend_beside(axes)
    return _svg(figure)


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


def peaks_plot(content: dict[str, Any]) -> str:
    """Predicted and measured peaks of device, host and disk, each with its budget where that is near."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.8))
    keys = {"device": "device_peak_bytes", "host": "host_peak_bytes", "disk": "disk_bytes"}
    for axes, (pool, key) in zip(figure.subplots(1, 3), keys.items(), strict=True):
        predicted, measured = content["predicted"][key], content["measured"][key]
        allowed = content["budget"][f"{pool}_bytes"]
        axes.barh(
            ["measured", "predicted"], [measured / GIB, predicted / GIB], color=[COLOURS[1], COLOURS[0]]
        )
        if allowed is not None and allowed < 3 * max(predicted, measured, 1):
            axes.axvline(allowed / GIB, color=BUDGET_COLOUR, linestyle="--")
        axes.set(title=pool, xlabel="GiB")
    figure.tight_layout()
    return _svg(figure)


def losses_plot(names: Sequence[str], histories: Sequence[History]) -> str:
    """The mean loss of each visit over the block's own steps.

    One run has a colour for each block; several runs have a colour each, and their later blocks fade.
    """
    figure, axes = _figure(9, 3)
    for place, (name, history) in enumerate(zip(names, histories, strict=True)):
        for block, losses in sorted(history.losses.items(), key=_place_of):
            label = " ".join(filter(None, [name, "" if block is None else f"block {block}"])) or "loss"
            label = f"\u200b{label}" if label.startswith("_") else label  # else matplotlib leaves it out
            colour = COLOURS[(place if len(names) > 1 else block or 0) % len(COLOURS)]
            fading = 1 / (1 + 0.3 * (block or 0))
            axes.plot(list(losses), list(losses.values()), color=colour, alpha=fading, label=label)
    axes.set(xlabel="steps of the block", ylabel="loss")
    if any(history.losses for history in histories):
        _legend_beside(axes)
    return _svg(figure)


def _place_of(item: tuple[int | None, object]) -> int:
    return -1 if item[0] is None else item[0]


def time_plot(time: dict[str, float]) -> str:
    """One bar of the run's seconds, by what they went to."""
    figure, axes = _figure(9, 1.1)
    parts = {
        "compute": time["compute_s"],
        "exposed transfer": time["exposed_transfer_s"],
        "commits": time["commit_s"],
    }
    parts["other"] = max(time["total_s"] - sum(parts.values()), 0.0)
    left = 0.0
    for colour, (part, seconds) in zip(COLOURS, parts.items(), strict=False):
        axes.barh([""], [seconds], left=[left], color=colour, label=f"{part} {format_seconds(seconds)}")
        left += seconds
    axes.set(xlabel="seconds")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, frameon=False)
    return _svg(figure)


def compared_peaks_plot(names: Sequence[str], reports: Sequence[Report]) -> str:
    """Predicted and measured peaks on the device, one pair of bars for each run."""
    figure, axes = _figure(9, 0.8 + 0.5 * len(names))
    for offset, kind, colour in ((0.2, "predicted", COLOURS[0]), (-0.2, "measured", COLOURS[1])):
        values = [report.content[kind]["device_peak_bytes"] / GIB for report in reports]
        places = [place + offset for place in range(len(names))]
        axes.barh(places, values, height=0.4, color=colour, label=f"{kind} peak on the device")
    axes.set(yticks=range(len(names)), yticklabels=list(names), xlabel="GiB")
    axes.invert_yaxis()
    _legend_beside(axes)
    return _svg(figure)


# ------------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that size in inches, with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _legend_beside(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _thinned(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points; each has the highest y of its share."""
    size = -(-len(xs) // MAX_POINTS) or 1
    return xs[::size], [max(ys[start : start + size]) for start in range(0, len(ys), size)]


def _svg(figure: Figure) -> str:
    """The drawing as an SVG element, without XML prolog and date."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
