"""Looks at every byte of a run folder, and goes back one commit.

`verify_run` changes nothing. `recover_run` makes the commit before the last the committed one; it refuses
where that one is damaged too. A commit shares with the one before the files of all blocks that it did not
train, so damage to those can only be mended from a copy.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.blocks import staging
from lowmem.blocks.arena import aligned_buffer
from lowmem.blocks.block_file import ChunkRequests, chunk_digest, whole_digest
from lowmem.blocks.run_dir import FileRecord, RunDir, RunState
from lowmem.blocks.seal import BACK
from lowmem.errors import LowmemError, ResumeError, StoreError
from lowmem.files import RESTORE, json_lines, open_regular, printable
from lowmem.units import MIB, PAGE, counted

MOST_HEADER_BYTES = 64 * MIB

TRIES = 5  # a run that trains may commit while we look
Row = dict[str, str]  # file, part ("committed", ...), state ("whole", ...), found


def check_contents(run: RunDir, state: RunState) -> None:
    """Reads a commit's files whole. Raises StoreError where one is not what was committed."""
    for record in state.files.values():
        fault = file_fault(run.path / record.name, record)
        if fault is not None:
            raise StoreError(f"{printable(run.path / record.name)}: {fault}; {BACK}")


def file_fault(path: Path, record: FileRecord) -> str | None:
    """What is wrong with a block's file, None if it is whole. Reads past the page cache where possible."""
    try:
        handle = open_regular(path)
        num_bytes = os.fstat(handle).st_size
        os.close(handle)
        if num_bytes != record.num_bytes:
            return f"expected {counted(record.num_bytes, 'byte')}, found {counted(num_bytes, 'byte')}"
        return _content_fault(path, record)
    except FileNotFoundError:
        return f"expected {counted(record.num_bytes, 'byte')}, found no file"
    except OSError as problem:
        return problem.strerror or str(problem)
    except StoreError as problem:  # fewer bytes came than were asked for
        return str(problem)


def _content_fault(path: Path, record: FileRecord) -> str | None:
    requests, chunk_bytes = ChunkRequests(), staging.CHUNK_BYTES
    buffer = aligned_buffer(max(min(chunk_bytes, record.num_bytes), PAGE))
    requests.read(path, 0, buffer[:PAGE])
    header_bytes = 8 + int.from_bytes(bytes(buffer[:8].numpy()), "little")
    if header_bytes % PAGE or header_bytes > min(record.num_bytes, MOST_HEADER_BYTES):
        return "its header is damaged"
    header = aligned_buffer(header_bytes)
    requests.read(path, 0, header)
    if hashlib.sha256(bytes(header.numpy())).hexdigest() != record.header:
        return "its header is damaged"
    digests = []
    for start in range(header_bytes, record.num_bytes, chunk_bytes):
        chunk = buffer[: min(chunk_bytes, record.num_bytes - start)]
        requests.read(path, start, chunk)
        digests.append(chunk_digest(chunk))
    return None if whole_digest(digests) == record.digest else "its data differ from what was committed"


# ------------------------------------------------------------------------------------------------------------
# lowmem verify


def verify_run(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads everything in a run folder and says what is whole, damaged or missing. Changes nothing.

    `whole` tells whether the run can go on and can go back; `files` has a row for each file. Raises
    ResumeError if the folder holds no run, or one of another schema.
    """
    run = RunDir(run_dir)
    if not run.exists():
        run.read_plan()
    for attempt in range(TRIES):
        before = _state_stamp(run)
        found = _looked_at(run)
        if found["whole"] or attempt == TRIES - 1 or _state_stamp(run) == before:
            break
    return found


def _state_stamp(run: RunDir) -> tuple[int, int] | None:
    try:
        found = run.state_path.lstat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _looked_at(run: RunDir) -> dict[str, Any]:
    rows: list[Row] = []
    try:
        run.identify()
        rows.append(_row("plan.json", "plan", None))
    except ResumeError:
        raise
    except LowmemError as problem:
        rows.append(_row("plan.json", "plan", str(problem)))
    states: dict[str, RunState | None] = {"committed": None, "previous": None}
    for part, path, read in (
        ("committed", run.state_path, run.read_state),
        ("previous", run.previous_path, run.read_previous),
    ):
        try:
            states[part] = read()
            if states[part] is not None:
                rows.append(_row(path.name, part, None))
            elif part == "committed":
                rows.append(_row(path.name, part, "nothing is committed yet", "missing"))
        except LowmemError as problem:
            rows.append(_row(path.name, part, str(problem)))
    rows += _block_rows(run, states)
    named = {row["file"] for row in rows}
    rows += [row for row in _other_rows(run) if row["file"] not in named]
    committed, previous = states["committed"], states["previous"]
    return {
        "run": str(run.path),
        "whole": not any(row["state"] in ("damaged", "missing") for row in rows),
        "visits_done": None if committed is None else committed.visits_done,
        "previous_visits_done": None if previous is None else previous.visits_done,
        "files": rows,
    }


def _row(file: str, part: str, fault: str | None, state: str = "damaged") -> Row:
    return {"file": file, "part": part, "state": "whole" if fault is None else state, "found": fault or ""}


def _block_rows(run: RunDir, states: dict[str, RunState | None]) -> Iterator[Row]:
    seen = set[str]()
    for part, state in states.items():
        for record in [] if state is None else state.files.values():
            if record.name not in seen:
                seen.add(record.name)
                fault = file_fault(run.path / record.name, record)
                missing = fault is not None and fault.endswith("found no file")
                yield _row(record.name, part, fault, "missing" if missing else "damaged")


def _other_rows(run: RunDir) -> Iterator[Row]:
    for name in run.names():
        if name == run.telemetry_path.name:
            yield _telemetry_row(run)
        elif run.is_ours(name):
            yield _row(name, "leftover", "no commit names it; removed when the run goes on", "leftover")
        elif name != "lock":
            yield _row(printable(name), "other", "not written by training; left alone", "other")


def _telemetry_row(run: RunDir) -> Row:
    """Torn lines are what a kill leaves, and are no damage."""
    try:
        lines = [record is not None for record in json_lines(run.telemetry_path, StoreError)]
    except StoreError as problem:
        return _row(run.telemetry_path.name, "telemetry", str(problem))
    row = _row(run.telemetry_path.name, "telemetry", None)
    return {**row, "found": f"{counted(len(lines), 'line')}, {lines.count(False)} torn"}


# ------------------------------------------------------------------------------------------------------------
# lowmem recover


def recover_run(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Makes the commit before the last the committed one, and says what is lost. The rest is trained again.

    Raises ResumeError if the folder holds no run or another process trains in it, StoreError if no commit is
    kept before the last one, or that one is damaged; nothing is then changed.
    """
    run = RunDir(run_dir)
    run.identify()
    run.lock()
    try:
        previous = run.read_previous()
        if previous is None:
            raise StoreError(
                f"{printable(run.previous_path)}: no commit is kept before the last one; {RESTORE}"
            )
        check_contents(run, previous)
        try:
            last = run.read_state()
        except StoreError:
            last = None
        run.go_back(previous)
    finally:
        run.release()
    return {
        "run": str(run.path),
        "visits_done": previous.visits_done,
        "visits_lost": None if last is None else last.visits_done - previous.visits_done,
        "lost": _lost(last, previous),
    }


def _lost(last: RunState | None, previous: RunState) -> str:
    if last is None:
        return f"all after {counted(previous.visits_done, 'visit')}; the last state could not be read"
    steps = {block.block: block.steps for block in previous.blocks}
    blocks = [
        f"{counted(block.steps - steps[block.block], 'step')} of block {block.block}"
        for block in last.blocks
        if block.steps > steps.get(block.block, block.steps)
    ]
    lost = [*blocks, *(["the evaluation"] if last.metrics is not None else [])]
    return ", ".join(lost) or "nothing that was trained"
