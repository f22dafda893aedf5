"""Draws tables as plain text, which looks the same in a terminal, a file and a test."""

from __future__ import annotations

import html
import io
import shutil
import sys
import textwrap
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from lowmem.units import shown

WIDTH = 110  # characters


def text_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
    width: int = WIDTH,
) -> str:
    """A title, a table and one line for each note.

    The first column stands on the left of its cells, the others on the right. Cells wrap at `width`
    characters a line. In a terminal all else ends between words at the terminal's width.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(shown(cell) for cell in row))
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None, markup=False, highlight=False).print(table)
    lines = (line.rstrip() for line in buffer.getvalue().strip("\n").splitlines())
    return "\n".join([fitted(title), *lines, *map(fitted, notes)])


def as_html(text: str) -> str:
    """Text for a notebook, which shows it as it stands."""
    return f"<pre>{html.escape(text)}</pre>"


class HtmlText:
    """Text as a notebook displays it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def _repr_html_(self) -> str:
        return as_html(self._text)


def fitted(line: str, further: int = 4) -> str:
    """A line that ends between words at the terminal's width, with all but the first indented by `further`.

    What goes to a file or a program stays one line.
    """
    if not sys.stdout.isatty():
        return line
    width = max(shutil.get_terminal_size().columns, 2 * further + 2)
    if len(line) <= width:
        return line
    begin = line[: len(line) - len(line.lstrip())]
    lines = textwrap.TextWrapper(
        width,
        initial_indent=begin,
        subsequent_indent=" " * further,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines.fill(line) or line
