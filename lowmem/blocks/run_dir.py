"""Reads and writes the run folder, which is the checkpoint; `state.json` is its only commit point.

    plan.json        recipe, profile and plan, frozen when the run began, and the run's identity
    state.json       what is committed: block files with size and digest, the queue's cursor, figures so far
    state.previous.json  the commit before, which `lowmem recover` goes back to
    block-0003.000012.1f3a….safetensors, shared.000012.1f3a….safetensors
                     one file per block, named by the number of visits done and the run's identity
    telemetry.jsonl  a line a step, plus events; never needed to resume
    lock             held by the process that trains

A visit ends in this order: its new files are written under new names and each is synced to the disk, then the
folder is synced, then the old state becomes `state.previous.json` and `state.json` is replaced, each in one
move. A kill or a power cut at any point leaves the old state with all of its files, or the new one. The files
of both states are kept. Files of this run that neither names are leftovers; they are removed when the run
goes on. A file that does not carry the run's identity in its name is not this run's, and is never touched.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lowmem.blocks.lock import FolderLock
from lowmem.blocks.seal import BACK, SCHEMA, check_schema, plan_digest, sealed, unsealed
from lowmem.blocks.traffic import Traffic, TransferTimes
from lowmem.errors import ResumeError, StoreError
from lowmem.files import (
    HELD,
    MOST_BYTES,
    RESTORE,
    check_path,
    fsync_dir,
    is_temporary,
    json_object,
    make_folder,
    open_regular,
    printable,
    read_bytes,
    refusals_of,
    write_whole,
)
from lowmem.schema import Section, parse
from lowmem.units import counted, finite

HOLD_TRIES = 5  # between two reads of the state a run may commit
ANOTHER_DIR = "give a new or an empty folder with --run-dir"
CURE = (
    "give a folder that can be written with --run-dir; "
    "`lowmem status`, `report`, `eval` and `sample --out` only read"
)
SHARED_KEY = "shared"
BASE_KEY = "base"  # frozen weights that are in no block
BLOCK_FILE = re.compile(rf"(block-\d{{4,}}|{SHARED_KEY}|{BASE_KEY})\.\d{{6,}}\.([0-9a-f]{{16}})\.safetensors")


def block_key(block: int) -> str:
    return f"block-{block}"


class FileRecord(Section):
    """A file: its name in the run folder, its size, its header's sha256, and its data's digest
    (`block_file.whole_digest`).
    """

    name: str = Field(pattern=r"^[a-z0-9.-]+\.safetensors$")
    num_bytes: int
    header: str = Field(pattern=r"^[0-9a-f]{64}$")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")


class BlockRecord(Section):
    """Figures of one block."""

    block: int
    visits: int = 0
    steps: int = 0
    loss: float | None = None  # mean over the steps of its last visit
    measured_peak_bytes: int = 0  # on the device, the largest of all its visits


class RankRecord(Section):
    """Figures of one rank of the last launch: its peaks, and what it moved."""

    rank: int
    device_peak_bytes: int
    host_peak_bytes: int
    traffic: Traffic
    transfer_s: TransferTimes


class RunState(Section):
    """Everything that is committed. Replaced as a whole, never edited."""

    schema_version: Literal[2] = Field(default=2, alias="schema")
    visits_done: int = Field(default=0, ge=0)
    files: dict[str, FileRecord] = {}  # "block-0" ..., "shared"
    blocks: list[BlockRecord] = []
    ranks: list[RankRecord] = []  # of a run by several ranks
    time: dict[str, float] = {}  # total_s, compute_s, exposed_transfer_s, commit_s
    traffic: Traffic = Traffic()
    transfer_s: TransferTimes = TransferTimes()
    measured: dict[str, int] = {}  # device_peak_bytes, host_peak_bytes, disk_bytes
    micro_batch_size: int | None = None  # smaller than the plan's where memory ran out
    first_metrics: dict[str, Any] | None = None  # before the first step, where a model begins with weights
    metrics: dict[str, Any] | None = None  # of the finished run


def is_lock(name: str) -> bool:
    """Whether a file is the lock of a rank other than 0."""
    return re.fullmatch(r"lock-rank\d{4,}", name) is not None


class RunDir:
    """A run folder: its paths, its lock, and what is committed in it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises ResumeError for what no path can be."""
        self.path = Path(path)
        with refusals_of(self.path, ResumeError, "give another --run-dir"):
            check_path(self.path)
        self.plan_path = self.path / "plan.json"
        self.state_path = self.path / "state.json"
        self.previous_path = self.path / "state.previous.json"
        self.telemetry_path = self.path / "telemetry.jsonl"
        self.identity = ""  # known once the plan is read or written; without one no file is removed
        self._lock = FolderLock(self.path / "lock")
        self._held: dict[str, int] = {}  # name of a file -> its open handle

    def telemetry_of(self, rank: int) -> Path:
        """Where a rank writes its records; rank 0 writes those of the run."""
        return self.path / f"telemetry-rank{rank:04d}.jsonl" if rank else self.telemetry_path

    def exists(self) -> bool:
        """Whether a plan lies in the folder. Raises ResumeError where the system does not let us look."""
        return self._lies_there(self.plan_path)

    def _lies_there(self, path: Path) -> bool:
        with refusals_of(self.path, ResumeError, "give another --run-dir"):
            try:
                path.lstat()
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def acquire(self, rank: int = 0) -> None:
        """Makes the folder and locks it for this process. The system frees the lock when the process ends,
        however it ends. Each `rank` of a run by several holds a lock of its own, rank 0 the folder's.

        Raises ResumeError if another process holds it, the folder cannot be made or written, or holds other
        files than a run's; nothing is then written.
        """
        if rank:
            self._lock = FolderLock(self.path / f"lock-rank{rank:04d}")
            with refusals_of(self._lock.path, ResumeError, CURE):
                held = self._lock.acquire()
            if not held:
                raise self._in_use()
            return
        self._require_ours()
        self.lock()

    def lock(self) -> None:
        """`acquire` without a look at what lies in the folder. Raises ResumeError."""
        with refusals_of(self.path, ResumeError, CURE):
            make_folder(self.path)
        with refusals_of(self._lock.path, ResumeError, CURE):
            held = self._lock.acquire()
        if held and any(FolderLock(self.path / name).is_held() for name in self.names() if is_lock(name)):
            self.release()  # a rank of an earlier launch has not ended yet
            held = False
        if not held:
            raise self._in_use()

    def _in_use(self) -> ResumeError:
        return ResumeError(
            f"run folder {printable(self.path)}: another process is training in it; "
            "wait for it, or choose another --run-dir"
        )

    def _require_ours(self) -> None:
        """Raises ResumeError unless the folder is a run's, empty, or not there."""
        if self.exists():
            self.read_state()
            return
        for name in self.names():
            empty_lock = name == "lock" and self._num_bytes(self.path / name) == 0
            if not empty_lock and not is_temporary(name, "plan.json"):  # left by a kill before the plan
                raise ResumeError(
                    f"run folder {printable(self.path)}: found {printable(name)} and no plan.json, so it is "
                    f"no run's folder; {ANOTHER_DIR}; nothing was written"
                )

    def names(self) -> list[str]:
        """Names of all that lies in the folder."""
        with refusals_of(self.path, ResumeError, ANOTHER_DIR):
            try:
                return sorted(os.listdir(self.path))
            except FileNotFoundError:
                return []

    def release(self) -> None:
        self._lock.release()

    def is_locked(self) -> bool:
        """Tells whether a process is training in the folder now. It writes nothing."""
        return self._lock.is_held()

    # --------------------------------------------------------------------------------------------------------
    # plan.json and state.json

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Freezes the plan of a new run, with an identity of its own. Raises StoreError."""
        self.identity = secrets.token_hex(8)
        write_whole(self.plan_path, self._plan_bytes(plan), StoreError, self.identity)

    def replace_plan(self, plan: Mapping[str, Any]) -> None:
        """Freezes another plan for the same run, under its lock. Raises StoreError.

        The seal allows both while the file is replaced, so that a kill in between leaves a whole run.
        """
        old, new = self._plan_content(), self._plan_bytes(plan)
        states = {path: self._read_sealed(path, old) for path in (self.state_path, self.previous_path)}
        for digests in ([plan_digest(old), plan_digest(new)], [plan_digest(new)]):
            for path, state in states.items():
                if state is not None:
                    write_whole(path, self._state_bytes(state, digests), StoreError, self.identity)
            write_whole(self.plan_path, new, StoreError, self.identity)

    def _plan_bytes(self, plan: Mapping[str, Any]) -> bytes:
        run = {"schema": SCHEMA, "identity": self.identity}
        return json.dumps({**finite(dict(plan)), "run": run}, indent=1).encode()

    def read_plan(self) -> dict[str, Any]:
        """The frozen plan, without the run's identity. Raises ResumeError if there is no plan, or one of
        another schema, and StoreError if it or the state is not what was written.
        """
        content = self.identify()
        plan = json_object(content, self.plan_path, StoreError)
        self._read_sealed(self.state_path, content)
        return {key: value for key, value in plan.items() if key != "run"}

    def identify(self) -> bytes:
        """Takes the run's identity from plan.json, and returns its bytes. Raises as `read_plan`, but leaves
        state.json alone.
        """
        if not self.exists():
            raise ResumeError(
                f"run folder {printable(self.path)}: no plan.json in it, so it is not a run; "
                "give the folder that `lowmem train` wrote"
            )
        return self._plan_content()

    def read_state(self) -> RunState | None:
        """Returns the committed state, None before the first commit.

        Raises StoreError if the state, or the plan beside it, is not what was written.
        """
        state = self._read_sealed(self.state_path, self._plan_content())
        return state if state is not None and state.files else None

    def read_previous(self) -> RunState | None:
        """Returns the commit before the last, None if there is none. Raises as `read_state`."""
        return self._read_sealed(self.previous_path, self._plan_content())

    def _plan_content(self) -> bytes:
        """The bytes of plan.json, none if there is no such file; takes the identity from it."""
        content = read_bytes(self.plan_path, MOST_BYTES, StoreError, missing_ok=True)
        if content:
            run = json_object(content, self.plan_path, StoreError).get("run")
            run = run if isinstance(run, dict) else {"schema": 1}
            check_schema(run.get("schema"), self.plan_path)
            identity = run.get("identity")
            if not isinstance(identity, str) or not re.fullmatch(r"[0-9a-f]{16}", identity):
                raise StoreError(f"{printable(self.plan_path)}: the run's identity is damaged; {RESTORE}")
            self.identity = identity
        return content

    def _read_sealed(self, path: Path, plan: bytes) -> RunState | None:
        content = read_bytes(path, MOST_BYTES, StoreError, BACK, missing_ok=True)
        if not content and not self._lies_there(path):
            return None
        raw = unsealed(content, path, self.identity, plan)
        return parse(RunState, raw, printable(path), StoreError)

    def _state_bytes(self, state: RunState, plan_digests: list[str]) -> bytes:
        return sealed(state.model_dump(mode="json", by_alias=True), self.identity, plan_digests)

    # --------------------------------------------------------------------------------------------------------
    # A commit

    def begin(self) -> None:
        """Commits that nothing is committed yet, before the first block file is written.

        So block files without a state are never taken for leftovers. Raises StoreError where there are some.
        """
        if not self._lies_there(self.state_path):
            found = [name for name in self.names() if self.is_ours(name) and BLOCK_FILE.fullmatch(name)]
            if found or self._lies_there(self.previous_path):
                raise StoreError(
                    f"{printable(self.state_path)}: missing, beside {len(found)} block files of this run; "
                    f"{BACK}"
                )
            self._replace_state(RunState())
        self.remove_leftovers(None)

    def commit(self, state: RunState, keep_previous: bool = True) -> None:
        """Replaces the committed state, keeps the one before unless told not to, and removes what none of
        them names.

        Its files must be on the disk already. Raises StoreError; the old state then still counts.
        """
        with refusals_of(self.path, StoreError):
            fsync_dir(self.path)  # the new files' names must be on the disk before a state names them
        self.check_files(state)
        old = self.read_state()
        # A commit without new files (metrics, a smaller micro-batch) leaves the commit before as it is.
        if keep_previous and old is not None and old.files != state.files:
            content = read_bytes(self.state_path, MOST_BYTES, StoreError)
            write_whole(self.previous_path, content, StoreError, self.identity, sync_folder=False)
        self._replace_state(state)
        if not keep_previous:
            self._forget_previous()
        self.remove_leftovers(state, on_their_way=True)

    def _replace_state(self, state: RunState) -> None:
        content = self._state_bytes(state, [plan_digest(self._plan_content())])
        # its folder is synced too, or a power cut could bring the old name back after its files are removed
        write_whole(self.state_path, content, StoreError, self.identity)
        if read_bytes(self.state_path, MOST_BYTES, StoreError) != content:
            raise StoreError(f"{printable(self.state_path)}: not what was just written; the disk is failing")

    def go_back(self, previous: RunState) -> None:
        """Makes the commit before the last the committed one. Its files must have been checked."""
        self._replace_state(previous)
        self._forget_previous()
        self.remove_leftovers(previous)

    def _forget_previous(self) -> None:
        if self._lies_there(self.previous_path):
            with refusals_of(self.previous_path, StoreError):
                self.previous_path.unlink()
                fsync_dir(self.path)

    def kept_names(self, state: RunState | None) -> set[str]:
        """Names of the block files of a state and of the commit before it."""
        try:
            previous = self.read_previous()
        except (StoreError, ResumeError):  # it is damaged; what it named can no longer be told
            previous = None
        return {record.name for each in (state, previous) if each for record in each.files.values()}

    def remove_leftovers(self, state: RunState | None, on_their_way: bool = False) -> None:
        """Removes the files of this run that neither `state` (None: nothing) nor the commit before names.

        `on_their_way`: but not those of later visits, which this process is writing.
        """
        kept = self.kept_names(state)
        for name in self.names():
            if on_their_way and state is not None and _visits_of(name) > state.visits_done:
                continue
            if self.is_ours(name) and name not in kept:
                with refusals_of(self.path / name, StoreError):
                    if stat.S_ISREG((self.path / name).lstat().st_mode):
                        (self.path / name).unlink()

    def is_ours(self, name: str) -> bool:
        """Whether this run wrote a file of this name: a block file, or a state on its way."""
        match = BLOCK_FILE.fullmatch(name)
        if match is not None:
            return self.identity != "" and match[2] == self.identity
        states = (self.state_path.name, self.previous_path.name)
        return self.identity != "" and any(is_temporary(name, state, self.identity) for state in states)

    # --------------------------------------------------------------------------------------------------------
    # Block files

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
                    with refusals_of(self.path / record.name, StoreError, RESTORE):
                        try:
                            self._held[record.name] = open_regular(self.path / record.name)
                        except FileNotFoundError:
                            raise _Gone from None
                return state
            except _Gone:  # a commit came between, or the file is lost: then the next try tells
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
        held = Path(f"{HELD}{self._held[name]}") if name in self._held else None
        return held if held is not None and held.exists() else self.path / name

    def check_files(self, state: RunState) -> None:
        """Raises StoreError if a committed file is missing or has another size. It reads no data."""
        for record in state.files.values():
            if record.name in self._held:
                found: int | None = os.fstat(self._held[record.name]).st_size
            else:
                found = self._num_bytes(self.path / record.name)
            if found != record.num_bytes:
                what = "no file" if found is None else counted(found, "byte")
                raise StoreError(
                    f"{printable(self.path / record.name)}: expected "
                    f"{counted(record.num_bytes, 'byte')}, found {what}; "
                    f"{BACK}"
                )

    def _num_bytes(self, path: Path) -> int | None:
        """The size of a regular file, None if there is none."""
        with refusals_of(path, StoreError, RESTORE):
            try:
                found = path.lstat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def file_name(self, key: str, visits_done: int) -> str:
        """Names a new file: `block-3` after 12 visits is `block-0003.000012.IDENTITY.safetensors`."""
        stem, _, number = key.partition("-")
        mark = f".{self.identity}" if self.identity else ""
        return f"{stem}{f'-{int(number):04d}' if number else ''}.{visits_done:06d}{mark}.safetensors"


def _visits_of(name: str) -> int:
    """The visit that a block file's name tells; 0 for other names."""
    return int(name.split(".")[1]) if BLOCK_FILE.fullmatch(name) else 0


class _Gone(Exception):
    pass
