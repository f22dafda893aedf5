"""Rows of a file of conversations, questions with answers, or texts: JSON lines, CSV, Parquet, plain text.

A row is a mapping, and comes with its number: the line of a JSONL or text file, else the row from 1 on. JSON
lines are read here, so that a bad one is named. CSV and Parquet are read by the library `datasets`, from the
local file and without its cache. A plain text is one text, which is read a piece at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.data.opening import open_file
from lowmem.data.packages import imported
from lowmem.errors import DataError
from lowmem.files import json_value, printable
from lowmem.units import MIB, shown

MOST_LINE_BYTES = 16 * MIB
READERS = {".csv": "csv", ".parquet": "parquet"}  # by suffix: the library's names
ALLOWED = ".jsonl (one JSON object in a line), .csv, .parquet, .txt (one long text)"
PIECE_BYTES = MIB  # of a text that is tokenised at once; it ends with a line
# What a row must hold, in the order in which the columns are looked for.
COLUMNS = (("messages",), ("prompt", "completion"), ("text",))


def rows_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its number; an empty line is none. Raises DataError with the number of a bad one."""
    where = printable(path)
    if path.suffix in (".jsonl", ".json"):
        yield from _json_rows(path, where)
    elif path.suffix in READERS:
        yield from _library_rows(path, where)
    elif path.suffix == ".txt":
        yield from _pieces(path, where)
    else:
        raise DataError(f"{where}: found the suffix '{path.suffix}'; allowed: {ALLOWED}; convert the file")


def _json_rows(path: Path, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_file(path, where, "give the path of a file that can be read") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES + 1), b""), 1):
            if len(line) > MOST_LINE_BYTES:
                raise DataError(
                    f"{where}, line {number}: longer than {MOST_LINE_BYTES} bytes; allowed: {ALLOWED}; "
                    "write one object in a line"
                )
            if not line.strip():
                continue
            try:
                row = json_value(line)
            except ValueError as problem:
                raise DataError(f"{where}, line {number}: no JSON ({problem}); mend the line") from None
            if not isinstance(row, dict):
                found = type(row).__name__
                raise DataError(f"{where}, line {number}: found {found}; allowed: an object; mend the line")
            yield number, row


def _pieces(path: Path, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    first = 1
    with open_file(path, where, "give the path of a file that can be read") as file:
        while lines := file.readlines(PIECE_BYTES):
            try:
                yield first, {"text": b"".join(lines).decode()}
            except UnicodeDecodeError as problem:
                line = first + problem.object[: problem.start].count(b"\n")
                cure = "allowed: text in UTF-8; convert the file"
                raise DataError(
                    f"{where}, line {line}: found byte {problem.object[problem.start]:#x}; {cure}"
                ) from None
            first += len(lines)


def _library_rows(path: Path, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    open_file(path, where, "give the path of a file that can be read").close()
    library = imported("datasets", where, ", or give JSON lines")
    try:
        files = {"data_files": str(path), "split": "train", "streaming": True}
        yield from enumerate(library.load_dataset(READERS[path.suffix], **files), 1)
    except Exception as problem:  # the library's errors are of many kinds
        said = shown(" ".join(str(problem).split()), 200)
        raise DataError(f"{where}: not readable ({said}); mend the file, or give JSON lines") from None


def columns_of(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The columns of COLUMNS that a row has. Raises DataError where it has none of them."""
    for columns in COLUMNS:
        if all(row.get(name) is not None for name in columns):
            return columns
    allowed = ", ".join(" with ".join(columns) for columns in COLUMNS)
    found = shown(", ".join(map(str, row)), 100) or "none"
    raise DataError(f"{where}: found the columns {found}; allowed: {allowed}; name them so")
