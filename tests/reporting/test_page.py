"""The page of a run: complete, self-contained, and safe to open whoever made the run folder."""

from __future__ import annotations

import json
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lowmem.blocks.run_dir import RunDir
from lowmem.errors import ConfigError
from lowmem.reporting.page import write_page
from lowmem.reporting.plots import INK, MAX_POINTS
from lowmem.reporting.report import comparison_table, read_report
from lowmem.units import format_bytes

PLOTS = 6  # of a run: loss, pace, memory over time, the model's part, peaks, time; each wide and narrow


class Seen(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def page_of(runs: list[Path], folder: Path) -> Seen:
    return Seen(write_page(runs, folder / "page.html").read_text(encoding="utf-8"))


def test_a_page_shows_what_the_report_says(trained: Path, tmp_path: Path) -> None:
    seen, content = page_of([trained], tmp_path), read_report(trained).content
    assert content["digest"] in seen.words
    for number in (content["predicted"]["device_peak_bytes"], content["measured"]["device_peak_bytes"]):
        assert format_bytes(number) in seen.words
    assert {f"{block['loss']:.4f}" for block in content["blocks"]} <= set(seen.words)
    assert seen.tags.count("svg") == 2 * PLOTS
    assert [word for word in seen.words if word][-1] == content["digest"]
    assert {"budget", "measured", "runtime floor", "optimizer state", "block 2"} <= set(seen.words)
    assert "environment.packages.torch" in seen.words


def test_a_page_fetches_nothing_and_runs_nothing(trained: Path, tmp_path: Path) -> None:
    seen = page_of([trained], tmp_path)
    assert not {"script", "link", "iframe", "object", "embed"} & set(seen.tags)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in seen.addresses)


def test_several_runs_are_compared(trained: Path, control: Path, tmp_path: Path) -> None:
    seen = page_of([trained, control], tmp_path)
    assert seen.tags.count("svg") == 2 * (2 + 2 * PLOTS)
    table = comparison_table(["a", "b"], [read_report(trained), read_report(control)])
    for run in (trained, control):
        result = f"accuracy {read_report(run).content['metrics']['value']:.4f}"
        assert result in seen.words and result in table


def test_runs_of_one_name_are_told_apart_and_their_different_settings_are_shown(
    trained: Path, control: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name / "run" for name in ("first", "second")]
    for source, folder in zip((trained, control), folders, strict=True):
        shutil.copytree(source, folder)
    seen = page_of(folders, tmp_path)
    assert {"first/run", "second/run"} <= set(seen.words)
    rows = seen.words[seen.words.index("Settings that differ") :]
    place = rows.index("recipe.method")
    assert [word for word in rows[place : place + 8] if word][:3] == [
        "recipe.method",
        "diffusion_blocks",
        "end_to_end",
    ]
    assert "recipe.train.batch_size" not in rows[: rows.index("Loss")], "it is the same in both"


def test_losses_of_two_kinds_have_axes_of_their_own(trained: Path, control: Path, tmp_path: Path) -> None:
    counts = []
    for runs in ([trained, trained], [trained, control]):
        comparison = Seen(write_page(runs, tmp_path / "page.html").read_text().split("<h3>")[0])
        counts.append(sum(word == "steps of the block" for word in comparison.words))
    assert counts == [2, 4], "one pair of axes, and two, each wide and narrow"


def test_lines_and_words_of_plots_follow_the_colour_of_the_page(trained: Path, tmp_path: Path) -> None:
    text = write_page([trained], tmp_path / "page.html").read_text()
    assert "prefers-color-scheme: dark" in text and text.count("currentColor") > 100
    assert "#000000" not in text and INK not in text and text.count('role="img"') == 2 * PLOTS


def test_nothing_in_a_run_folder_becomes_markup_or_a_formula(trained: Path, tmp_path: Path) -> None:
    hostile: Any = "<script>alert(1)</script>$\\frac"
    folder = tmp_path / "x$y_$<b>"
    shutil.copytree(trained, folder)
    plan = RunDir(folder).read_plan()
    plan["profile"]["name"] = hostile
    plan["settings"]["tier"] = hostile
    RunDir(folder).replace_plan(plan)
    with open(folder / "telemetry.jsonl", "a", encoding="utf-8") as file:
        for record in (
            {"event": "step", "time": hostile},
            {"event": "step", "time": 1.0, "step": 0, "host_bytes": hostile},
            {"event": "open", "environment": 3},
        ):
            file.write(json.dumps(record) + "\n")
    (folder / "samples.txt").write_text(hostile)
    (folder / "samples.png").write_text(hostile)
    seen = page_of([folder], tmp_path)
    assert "script" not in seen.tags and "b" not in seen.tags
    assert hostile in seen.words


def test_a_long_run_makes_a_page_of_bounded_size(trained: Path, tmp_path: Path) -> None:
    sizes = []
    for steps in (5 * MAX_POINTS, 20 * MAX_POINTS):
        folder = tmp_path / str(steps)
        shutil.copytree(trained, folder)
        with open(folder / "telemetry.jsonl", "w", encoding="utf-8") as file:
            for step in range(steps):
                file.write(
                    json.dumps(
                        {
                            "event": "step",
                            "step": step,
                            "time": float(step),
                            "host_bytes": (step * 7919) % 10_007 * 100_000,
                        }
                    )
                    + "\n"
                )
        sizes.append(write_page([folder], tmp_path / "page.html").stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 0.1 * sizes[0]


def test_without_matplotlib_the_message_says_what_to_install(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"lowmem\[plots\]"):
        write_page([trained], tmp_path / "page.html")


def test_a_page_that_cannot_be_written_is_refused_in_one_line(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory") as caught:
        write_page([trained], tmp_path / "missing" / "page.html")
    assert "\n" not in str(caught.value)
