"""A run, or several beside each other, as one HTML page: everything in one file, no script, nothing fetched.

A run folder may come from elsewhere: all of its text is escaped, and only numbers reach the plots. Needs
matplotlib (extra `plots`).
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.blocks.run_dir import RunDir
from lowmem.errors import ConfigError
from lowmem.reporting.report import BLOCK_COLUMNS, MEMORY_COLUMNS, Report, comparison_rows, read_report
from lowmem.reporting.telemetry import read_records
from lowmem.units import GIB, format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 800  # of a line over time: each the highest of its share of the records
MAX_SAMPLE_BYTES = 4 * 1024 * 1024  # of a picture or text put into the page
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
FAR = 2.5  # a budget so many times the peak lies above the plot, which would show nothing else

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; } th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child, .words td { text-align: left; } svg { max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; }
</style></head><body>
<h1>{{ title }}</h1>
{% macro table(columns, rows, kind="") %}<table class="{{ kind }}"><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endmacro %}
{% if comparison %}{{ table(comparison.columns, comparison.rows) }}{% for plot in comparison.plots %}{{ plot | safe }}{% endfor %}{% endif %}
{% for run in runs %}
<h2>{{ run.name }}</h2><p>{{ run.summary }}</p>
<h3>Memory over time, against the budget</h3>{{ run.memory_plot | safe }}
<h3>Predicted and measured</h3>{{ table(memory_columns, run.memory) }}{{ run.peaks_plot | safe }}
<h3>Blocks</h3>{{ table(block_columns, run.blocks) }}{{ run.loss_plot | safe }}
<h3>Time and traffic</h3>{{ run.time_plot | safe }}{{ table((), run.traffic, "words") }}
{% if run.result %}<h3>Result</h3>{{ table((), run.result, "words") }}{% endif %}
{% if run.picture %}<h3>Samples</h3><img alt="samples" src="data:image/png;base64,{{ run.picture }}">{% endif %}
{% if run.text %}<h3>Samples</h3><pre>{{ run.text }}</pre>{% endif %}
<h3>Settings</h3>{{ table((), run.settings, "words") }}
<details><summary>Recipe, profile and environment</summary>{{ table((), run.details, "words") }}</details>
{% endfor %}
</body></html>
"""


@dataclass
class History:
    """What `telemetry.jsonl` tells of a run.

    Seconds are of training: time between processes does not count.
    """

    seconds: list[float] = field(default_factory=list)
    device_bytes: list[float] = field(default_factory=list)
    host_bytes: list[float] = field(default_factory=list)
    losses: dict[int | None, dict[int, float]] = field(
        default_factory=dict
    )  # block (None: all) -> step -> mean loss of the visit that ended there
    environment: dict[str, Any] = field(default_factory=dict)


def write_page(run_dirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Writes the page of these runs.

    Raises ResumeError or StoreError for a folder that is no run, ConfigError without matplotlib.
    """
    from jinja2 import Environment

    reports = [read_report(run_dir) for run_dir in run_dirs]
    histories = [
        _history(Path(run_dir), report.content) for run_dir, report in zip(run_dirs, reports, strict=True)
    ]
    names = [Path(run_dir).resolve().name for run_dir in run_dirs]
    with _style():
        runs = [
            _run(Path(folder), name, *parts)
            for folder, name, parts in zip(run_dirs, names, zip(reports, histories, strict=True), strict=True)
        ]
        comparison = None
        if len(runs) > 1:
            head, rows = comparison_rows(names, reports)
            comparison = {
                "columns": head,
                "rows": rows,
                "plots": [_losses_plot(names, histories), _compared_peaks_plot(names, reports)],
            }
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    columns = {"memory_columns": MEMORY_COLUMNS, "block_columns": BLOCK_COLUMNS}
    text = (
        Environment(autoescape=True)
        .from_string(TEMPLATE)
        .render(title=f"lowmem: {title}", runs=runs, comparison=comparison, **columns)
    )
    return _written(Path(out), text)


def write_curves(
    run_dirs: Sequence[str | os.PathLike[str]], names: Sequence[str], out: str | os.PathLike[str]
) -> Path:
    """Writes the learning curves of these runs as one SVG. Raises as `write_page`."""
    histories = [_history(Path(run_dir), read_report(run_dir).content) for run_dir in run_dirs]
    with _style():
        return _written(Path(out), _losses_plot(names, histories))


def _style() -> AbstractContextManager[None]:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "plots: need matplotlib, which is not installed; allowed: any 3.8 or newer: pip install 'lowmem[plots]'"
        ) from None
    fixed: Any = {"svg.fonttype": "none", "svg.hashsalt": "lowmem", "text.parse_math": False}
    return matplotlib.rc_context(
        {**fixed, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )


def _written(path: Path, text: str) -> Path:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise ConfigError(
            f"{path}: {problem.strerror}; give a file in a folder that can be written"
        ) from None
    return path


def _run(folder: Path, name: str, report: Report, history: History) -> dict[str, Any]:
    content = report.content
    plan_parts = {
        "recipe": content["recipe"],
        "profile": content["profile"],
        "environment": history.environment,
    }
    return {
        "name": name,
        "summary": report.summary(),
        "memory": report.memory_rows(),
        "blocks": report.block_rows(),
        "traffic": report.closing_rows(),
        "result": [
            (key.replace("_", " "), _shown(value))
            for key, value in (content["metrics"] or {}).items()
            if not isinstance(value, list | dict)
        ],
        "settings": [(key, _shown(value)) for key, value in content["settings"].items()],
        "details": list(_flat("", plan_parts)),
        "memory_plot": _memory_plot(content, history),
        "peaks_plot": _peaks_plot(content),
        "loss_plot": _losses_plot([""], [history]),
        "time_plot": _time_plot(content["time"]),
        "picture": _sample(
            folder / "samples.png",
            lambda data: base64.b64encode(data).decode() if data.startswith(b"\x89PNG") else None,
        ),
        "text": _sample(folder / "samples.txt", lambda data: data.decode("utf-8", "replace")),
    }


def _history(folder: Path, content: dict[str, Any]) -> History:
    unified = content["device_type"] != "cuda"
    history, visit, before, elapsed = History(), {}, None, 0.0
    for record in read_records(RunDir(folder).telemetry_path):
        now, event = record.get("time"), record.get("event")
        if not isinstance(now, int | float):
            continue
        elapsed += 0.0 if before is None or event == "open" else max(now - before, 0.0)
        before = now
        if event == "open" and isinstance(record.get("environment"), dict):
            history.environment = record["environment"]
        elif event == "visit":
            visit = record
        elif event == "step":
            host = _number(record.get("host_bytes"))
            device = (
                host
                if unified
                else _number(record.get("nvml_process_bytes") or record.get("device_reserved_bytes"))
            )
            history.seconds.append(elapsed)
            history.host_bytes.append(host)
            history.device_bytes.append(device)
        elif event == "visited" and visit.get("visit") == record.get("visit"):
            blocks = record.get("blocks") or [None]
            last = int(_number(visit.get("first_step")) + _number(visit.get("num_steps")))
            history.losses.setdefault(blocks[0] if len(blocks) == 1 else None, {})[last] = _number(
                record.get("loss")
            )
    return history


# ------------------------------------------------------------------------------------------------------------
# Plots


def _memory_plot(content: dict[str, Any], history: History) -> str:
    """Measured memory over the plan's categories, one on the other, and the budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4))
    axes = figure.subplots()
    seconds, device = _thinned(history.seconds, history.device_bytes)
    floor, end = 0.0, max(seconds, default=1.0) or 1.0
    parts = content["predicted"]["by_category"]
    for colour, category in zip(
        COLOURS[: len(parts)], reversed(parts), strict=True
    ):  # the runtime's floor at the bottom
        num_bytes = parts[category]
        axes.fill_between(
            [0, end],
            floor / GIB,
            (floor + num_bytes) / GIB,
            color=colour,
            alpha=0.45,
            linewidth=0,
            label=category.replace("_", " "),
        )
        floor += num_bytes
    axes.plot(seconds, [value / GIB for value in device], color="black", linewidth=1, label="measured")
    if content["device_type"] == "cuda":
        seconds, host = _thinned(history.seconds, history.host_bytes)
        axes.plot(seconds, [value / GIB for value in host], color="grey", linewidth=1, label="measured, host")
    budget, top = (
        content["budget"]["device_bytes"] / GIB,
        1.15 * max([floor / GIB, *(value / GIB for value in device)]),
    )
    if budget > FAR * top:
        axes.plot([], [], color=COLOURS[3], linestyle="--", label=f"budget {budget:.1f} GiB, above")
    else:
        axes.axhline(budget, color=COLOURS[3], linestyle="--", label="budget")
        top = max(top, 1.05 * budget)
    axes.set(xlabel="seconds of training", ylabel="GiB", ylim=(0, top), xlim=(0, end))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _svg(figure)


def _peaks_plot(content: dict[str, Any]) -> str:
    pools = [
        (pool, f"{pool}_peak_bytes" if pool != "disk" else "disk_bytes")
        for pool in ("device", "host", "disk")
    ]
    bars = [
        (pool, content["predicted"][key], content["measured"][key], content["budget"][f"{pool}_bytes"])
        for pool, key in pools
    ]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.8))
    for axes, (pool, predicted, measured, allowed) in zip(figure.subplots(1, 3), bars, strict=True):
        axes.barh(
            ["measured", "predicted"], [measured / GIB, predicted / GIB], color=[COLOURS[1], COLOURS[0]]
        )
        if allowed is not None and allowed < 3 * max(predicted, measured, 1):
            axes.axvline(allowed / GIB, color=COLOURS[3], linestyle="--")
        axes.set(title=pool, xlabel="GiB")
    figure.tight_layout()
    return _svg(figure)


def _losses_plot(names: Sequence[str], histories: Sequence[History]) -> str:
    """Mean loss of each visit, over the block's own steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3))
    axes = figure.subplots()
    for place, (name, history) in enumerate(zip(names, histories, strict=True)):
        for block, losses in sorted(
            history.losses.items(), key=lambda item: -1 if item[0] is None else item[0]
        ):
            label = " ".join(filter(None, [name, "" if block is None else f"block {block}"])) or "loss"
            colour = COLOURS[(place if len(names) > 1 else block or 0) % len(COLOURS)]
            axes.plot(
                list(losses),
                list(losses.values()),
                color=colour,
                alpha=1 / (1 + 0.3 * (block or 0)),
                label=label,
            )
    axes.set(xlabel="steps of the block", ylabel="loss")
    if any(history.losses for history in histories):
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _svg(figure)


def _time_plot(time: dict[str, float]) -> str:
    from matplotlib.figure import Figure

    figure, left = Figure(figsize=(9, 1.1)), 0.0
    axes = figure.subplots()
    parts = {
        "compute": time["compute_s"],
        "exposed transfer": time["exposed_transfer_s"],
        "commits": time["commit_s"],
    }
    parts["other"] = max(time["total_s"] - sum(parts.values()), 0.0)
    for colour, (part, seconds) in zip(COLOURS, parts.items(), strict=False):
        axes.barh([""], [seconds], left=[left], color=colour, label=f"{part} {format_seconds(seconds)}")
        left += seconds
    axes.set(xlabel="seconds")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, frameon=False)
    return _svg(figure)


def _compared_peaks_plot(names: Sequence[str], reports: Sequence[Report]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.8 + 0.5 * len(names)))
    axes = figure.subplots()
    for offset, kind, colour in ((0.2, "predicted", COLOURS[0]), (-0.2, "measured", COLOURS[1])):
        values = [report.content[kind]["device_peak_bytes"] / GIB for report in reports]
        axes.barh(
            [place + offset for place in range(len(names))],
            values,
            height=0.4,
            color=colour,
            label=f"{kind} peak on the device",
        )
    axes.set(yticks=range(len(names)), yticklabels=list(names), xlabel="GiB")
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """The drawing alone, without XML prolog and date."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


# ------------------------------------------------------------------------------------------------------------


def _thinned(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    size = -(-len(xs) // MAX_POINTS) or 1
    return xs[::size], [max(ys[start : start + size]) for start in range(0, len(ys), size)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _flat(prefix: str, value: Any) -> Any:
    """(dotted key, text) of everything in a nested dictionary."""
    if not isinstance(value, dict):
        yield (
            prefix,
            format_bytes(value) if prefix.endswith("_bytes") and isinstance(value, int) else _shown(value),
        )
        return
    for key, item in value.items():
        yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)


def _sample(path: Path, read: Any) -> str | None:
    if not path.is_file() or path.stat().st_size > MAX_SAMPLE_BYTES:
        return None
    return read(path.read_bytes())  # type: ignore[no-any-return]
