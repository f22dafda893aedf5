"""Writes one run, or several side by side, as one HTML page in one file.

The page has no script and fetches nothing. A run folder may come from elsewhere, so all of its text is
escaped. The template is `page.html.j2`; the plots need matplotlib (extra `plots`).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lowmem.errors import ConfigError
from lowmem.machine.profile import profile_from_dict
from lowmem.reporting.history import History, read_history
from lowmem.reporting.output import check_output, write_output
from lowmem.reporting.plots import (
    compared_peaks_plot,
    losses_plot,
    losses_svg,
    memory_plot,
    model_plot,
    pace_plot,
    peaks_plot,
    plot_style,
    time_plot,
)
from lowmem.reporting.report import (
    BLOCK_COLUMNS,
    COMPARISON_COLUMNS,
    MEMORY_COLUMNS,
    Report,
    comparison_rows,
    read_report,
)
from lowmem.units import MIB, format_bytes, shown

Status = dict[str, Any]  # title, lines for a wide page and for a narrow one
MOST_NAME = 60  # characters of a run's name in titles and legends
MAX_SAMPLE_BYTES = 4 * MIB  # a larger picture or text is left out of the page
PNG_START = b"\x89PNG"


def write_page(run_dirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Writes the page of these runs to the file `out`, and returns its path.

    Raises ResumeError or StoreError for a folder that is no run, ProfileError for a plan without a machine's
    profile, ConfigError without matplotlib or where `out` cannot be written.
    """
    check_output(out, "page")
    return _written(Path(out), page_text(run_dirs))


def page_text(run_dirs: Sequence[str | os.PathLike[str]], status: Status | None = None) -> str:
    """The page of these runs. `status`: where the one run stands now. Raises as `write_page`."""
    reports = [read_report(run_dir) for run_dir in run_dirs]
    histories = [
        read_history(folder, _is_unified(report)) for folder, report in zip(run_dirs, reports, strict=True)
    ]
    names = _names(run_dirs)
    with plot_style():
        comparison = None if len(names) == 1 else _comparison(names, reports, histories)
        runs = [
            _run(Path(folder), name, report, history)
            for folder, name, report, history in zip(run_dirs, names, reports, histories, strict=True)
        ]
    return str(
        _template().render(
            title=f"lowmem: {names[0] if len(names) == 1 else f'{len(names)} runs'}",
            runs=runs,
            comparison=comparison,
            status=status,
            memory_columns=MEMORY_COLUMNS,
            block_columns=BLOCK_COLUMNS,
        )
    )


def _names(run_dirs: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The runs' names: as many of the last parts of their paths as tell them apart."""
    paths = [Path(run_dir).resolve().parts for run_dir in run_dirs]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [shown(name, MOST_NAME) for name in names]


def write_curves(
    run_dirs: Sequence[str | os.PathLike[str]], names: Sequence[str], out: str | os.PathLike[str]
) -> Path:
    """Writes the learning curves of these runs as one SVG. Raises as `write_page`."""
    reports = [read_report(run_dir) for run_dir in run_dirs]
    histories = [
        read_history(folder, _is_unified(report)) for folder, report in zip(run_dirs, reports, strict=True)
    ]
    with plot_style():
        return _written(Path(out), losses_svg(names, histories, [_kind_of_loss(r) for r in reports]))


def _kind_of_loss(report: Report) -> str:
    """Losses of one kind have one scale: those of the same kind of model, trained by the same method."""
    return f"{report.content['recipe']['model']['name']}, {report.content['method']}"


def _is_unified(report: Report) -> bool:
    return profile_from_dict(report.content["profile"], "plan.json: profile").unified


def _template() -> Any:
    """The page's jinja2 template, which escapes every value."""
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError:
        raise ConfigError(
            "page: needs jinja2, which is not installed; allowed: any 3 or newer: pip install 'lowmem[plots]'"
        ) from None
    environment = Environment(loader=PackageLoader("lowmem", "reporting"), autoescape=True)
    return environment.get_template("page.html.j2")


def _written(path: Path, text: str) -> Path:
    return write_output(path, text.encode("utf-8", "replace"), "page")


def _comparison(
    names: Sequence[str], reports: Sequence[Report], histories: Sequence[History]
) -> dict[str, Any]:
    """What the template shows above the runs."""
    return {
        "columns": COMPARISON_COLUMNS,
        "rows": comparison_rows(names, reports),
        "differences": _differences(reports),
        "plots": [
            losses_plot(names, histories, [_kind_of_loss(report) for report in reports]),
            compared_peaks_plot(names, reports),
        ],
        "names": names,
    }


def _differences(reports: Sequence[Report]) -> list[tuple[str, ...]]:
    """(key, the value of each run) of what is not the same in all of them."""
    flat = [
        dict(_flat("", {"profile": report.content["profile"]["name"], **_chosen(report.content)}))
        for report in reports
    ]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = [(key, *(each.get(key, "-") for each in flat)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _chosen(content: dict[str, Any]) -> dict[str, Any]:
    return {"recipe": content["recipe"], "settings": content["settings"]}


def _run(folder: Path, name: str, report: Report, history: History) -> dict[str, Any]:
    """What the template shows of one run."""
    content = report.content
    details = {
        "recipe": content["recipe"],
        "profile": content["profile"],
        "environment": history.environment,
    }
    return {
        "name": name,
        "summary": report.summary(),
        "memory": report.memory_rows(),
        "blocks": report.block_rows(),
        "traffic": [*report.closing_rows()[:-1], *([("note", history.note)] if history.note else [])],
        "result": [
            (key.replace("_", " "), _shown(value))
            for key, value in (content["metrics"] or {}).items()
            if not isinstance(value, list | dict)
        ],
        "settings": [(key, _shown(value)) for key, value in content["settings"].items()],
        "details": list(_flat("", details)),
        "memory_plot": memory_plot(content, history, _is_unified(report)),
        "peaks_plot": peaks_plot(content),
        "model_plot": model_plot(content),
        "loss_plot": losses_plot([""], [history], [""]),
        "pace_plot": pace_plot(history, content["recipe"]["train"]["batch_size"]),
        "digest": content["digest"] or "-",
        "time_plot": time_plot(content["time"]),
        "picture": _sample(folder / "samples.png", _picture),
        "text": _sample(folder / "samples.txt", lambda data: data.decode("utf-8", "replace")),
    }


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of everything in a nested dictionary."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)
    elif prefix.endswith("_bytes") and isinstance(value, int):
        yield prefix, format_bytes(value)
    else:
        yield prefix, _shown(value)


def _picture(data: bytes) -> str | None:
    return base64.b64encode(data).decode() if data.startswith(PNG_START) else None


def _sample(path: Path, read: Callable[[bytes], str | None]) -> str | None:
    if not path.is_file() or path.stat().st_size > MAX_SAMPLE_BYTES:
        return None
    return read(path.read_bytes())
