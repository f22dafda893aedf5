"""Reads and writes the run folder, which is the checkpoint; `state.json` is its only commit point.

    plan.json        recipe, profile and plan, frozen when the run began
    state.json       what is committed: block files with size and digest, the queue's cursor, figures so far
    block-0003.000012.safetensors, shared.000012.safetensors
                     one file per block, named by the number of visits done
    telemetry.jsonl  a line a step, plus events; never needed to resume
    lock             held by the process that trains

A visit ends in this order: its new files are written under new names and each is synced to the disk, then the
folder is synced, then `state.json` is replaced in one move. A kill or a power cut at any point leaves the old
state with all of its files, or the new one. Files that the state does not name are leftovers of a kill; they
are removed when the run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import Field

from lowmem.blocks.traffic import Traffic, TransferTimes
from lowmem.errors import ResumeError, StoreError
from lowmem.schema import Section, parse

LOCK_WAIT_S = 0.5  # `lowmem status` holds the lock for an instant when it looks at it
HOLD_TRIES = 5  # between two reads of the state a run may commit


class FileRecord(Section):
    """A file: its name in the run folder, its size, and its data's digest (`block_file.whole_digest`)."""

    name: str = Field(pattern=r"^[a-z0-9.-]+\.safetensors$")
    num_bytes: int
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")


class BlockRecord(Section):
    """Figures of one block."""

    block: int
    visits: int = 0
    steps: int = 0
    loss: float | None = None  # mean over the steps of its last visit
    measured_peak_bytes: int = 0  # on the device, the largest of all its visits


class RunState(Section):
    """Everything that is committed. Replaced as a whole, never edited."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    visits_done: int = 0
    files: dict[str, FileRecord] = {}  # "block-0" ..., "shared"
    blocks: list[BlockRecord] = []
    time: dict[str, float] = {}  # total_s, compute_s, exposed_transfer_s, commit_s
    traffic: Traffic = Traffic()
    transfer_s: TransferTimes = TransferTimes()
    measured: dict[str, int] = {}  # device_peak_bytes, host_peak_bytes, disk_bytes
    micro_batch_size: int | None = None  # smaller than the plan's where memory ran out
    metrics: dict[str, Any] | None = None  # of the finished run


class RunDir:
    """A run folder: its paths, its lock, and what is committed in it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.plan_path = self.path / "plan.json"
        self.state_path = self.path / "state.json"
        self.telemetry_path = self.path / "telemetry.jsonl"
        self._lock = FileLock(self.path / "lock")
        self._held: dict[str, int] = {}  # name of a file -> its open handle

    def exists(self) -> bool:
        return self.plan_path.is_file()

    def acquire(self) -> None:
        """Makes the folder and locks it for this process. The system frees the lock when the process ends,
        however it ends.

        Raises ResumeError if another process holds it, or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise ResumeError(
                f"run folder {self.path}: {problem.strerror}; give a folder that can be made with --run-dir"
            ) from None
        try:
            self._lock.acquire(timeout=LOCK_WAIT_S, poll_interval=0.02)
        except Timeout:
            raise ResumeError(
                f"run folder {self.path}: another process is training in it; "
                "wait for it, or choose another --run-dir"
            ) from None

    def release(self) -> None:
        self._lock.release()

    def is_locked(self) -> bool:
        """Tells whether a process is training in the folder now."""
        if not (self.path / "lock").exists():
            return False
        try:
            with FileLock(self.path / "lock", timeout=0):
                return False
        except Timeout:
            return True

    # --------------------------------------------------------------------------------------------------------
    # plan.json and state.json

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        write_json(self.plan_path, plan)

    def read_plan(self) -> dict[str, Any]:
        """Raises ResumeError if there is no plan, StoreError if it is not JSON."""
        if not self.exists():
            raise ResumeError(
                f"run folder {self.path}: no plan.json in it, so it is not a run; "
                "give the folder that `lowmem train` wrote"
            )
        return read_json(self.plan_path)

    def read_state(self) -> RunState | None:
        """Returns the committed state, None before the first commit.

        Raises StoreError if the file is not what lowmem writes.
        """
        if not self.state_path.exists():
            return None
        return parse(RunState, read_json(self.state_path), str(self.state_path), StoreError)

    def hold_committed(self) -> RunState | None:
        """Returns the committed state and holds its files open until `let_go`, None before the first commit.

        A process that trains in the folder replaces files at every commit. Held files stay readable.
        Raises StoreError if a file is missing.
        """
        state = self.read_state()
        for _ in range(HOLD_TRIES):
            if state is None:
                return None
            try:
                for record in state.files.values():
                    self._held[record.name] = os.open(self.path / record.name, os.O_RDONLY)
                return state
            except FileNotFoundError:  # a commit came between, or the file is lost: then the next try tells
                self.let_go()
                state = self.read_state()
        if state is not None:
            self.check_files(state)
        return state

    def let_go(self) -> None:
        """Closes the files that `hold_committed` holds."""
        while self._held:
            os.close(self._held.popitem()[1])

    def file_path(self, name: str) -> Path:
        """Where to open a block's file: through the handle held on it, where the system allows that."""
        held = Path(f"/proc/self/fd/{self._held[name]}") if name in self._held else None
        return held if held is not None and held.exists() else self.path / name

    def commit(self, state: RunState) -> None:
        """Replaces the committed state, then removes the files that it no longer names.

        Its files must be on the disk already. Raises StoreError; the old state then still counts.
        """
        fsync_dir(self.path)  # the new files' names must be on the disk before a state names them
        write_json(self.state_path, state.model_dump(mode="json", by_alias=True))
        self.remove_leftovers(state)

    def remove_leftovers(self, state: RunState | None) -> None:
        """Removes the block files that `state` does not name (None: all of them)."""
        named = {record.name for record in state.files.values()} if state else set()
        for path in self.path.glob("*.safetensors"):
            if path.name not in named:
                path.unlink()

    def check_files(self, state: RunState) -> None:
        """Raises StoreError if a committed file is missing or has another size. It reads no data."""
        for record in state.files.values():
            path = self.file_path(record.name)
            found = path.stat().st_size if path.is_file() else None
            if found != record.num_bytes:
                what = "no file" if found is None else f"{found} bytes"
                raise StoreError(
                    f"{self.path / record.name}: expected {record.num_bytes} bytes, found {what}; "
                    "restore it from a copy, or begin again in another --run-dir; nothing was overwritten"
                )

    def file_name(self, key: str, visits_done: int) -> str:
        """Names a new file: `block-3` after 12 visits is `block-0003.000012.safetensors`."""
        stem, _, number = key.partition("-")
        return f"{stem}{f'-{int(number):04d}' if number else ''}.{visits_done:06d}.safetensors"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a JSON file in one move: a reader, or whoever comes after a kill, sees the old one or the new.

    Raises StoreError.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with none of its bytes
        os.replace(temporary, path)
        fsync_dir(path.parent)  # or it could bring the old name back after we have removed its files
    except OSError as problem:
        raise StoreError(
            f"{path}: {problem.strerror}; the last commit is kept: mend this, then run the same command again"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises StoreError if the file is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise StoreError(
            f"{path}: not readable as JSON ({problem}); "
            "restore it from a copy, or begin again in another --run-dir"
        ) from None
    if not isinstance(content, dict):
        raise StoreError(
            f"{path}: found {type(content).__name__}; expected an object; restore it from a copy"
        )
    return content


def fsync_dir(path: Path) -> None:
    """Waits until the folder's names are on the disk."""
    if os.name == "nt":  # Windows has no handle for a folder; its file system journals the names
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
