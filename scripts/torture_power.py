"""Power loss: every state that a disk may be left in, and the run that goes on from it.

A file system promises only what was synced. So at every file operation of a run this notes what is durable:
the content of a file at its last fsync, and the names in the folder at the folder's last fsync. What a power
cut leaves is that, plus any part of what came later: these are the states that are built here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torture_kit as kit
from torture_kit import Bench, Tally, command, in_child
from torture_parts import prepared, trained

Entries = dict[str, bytes]  # name -> content


class Disk:
    """What is durable of one folder while a process writes to it.

    The states are kept below `kept`, once each. `mixes`: in how many ways the writes that were not synced are
    dropped, torn and reordered at each operation.
    """

    def __init__(self, folder: Path, kept: Path, rng: random.Random, mixes: int) -> None:
        self.folder, self.kept, self._rng, self._mixes = folder, kept, rng, mixes
        self.count, self._at = 0, -1  # as `trained` asks of whoever counts operations
        # A handle on every inode that was seen: its number is then never given to another file.
        self._pins: dict[int, int] = {}
        self._plain_open = os.open
        self._names = self._listed()  # at the folder's last fsync; what is there already is durable
        # inode -> content at its last fsync
        self._content = {inode: (folder / name).read_bytes() for name, inode in self._names.items()}
        self._lock = threading.Lock()

    def install(self) -> None:
        plain_fsync = os.fsync

        def fsync(handle: int) -> None:
            plain_fsync(handle)
            with self._lock, contextlib.suppress(FileNotFoundError):
                path = Path(os.readlink(f"/proc/self/fd/{handle}"))
                if path == self.folder:
                    self._names = self._listed()
                elif path.parent == self.folder:
                    self._content[os.fstat(handle).st_ino] = path.read_bytes()
            self.cut()

        os.fsync = fsync
        for name in ("replace", "unlink", "open", "rename", "link"):
            setattr(os, name, self._watched(getattr(os, name)))
        plain, disk = io.FileIO, self

        class File(plain):  # type: ignore[misc,valid-type]
            def write(self, data: Any) -> Any:
                written = plain.write(self, data)
                disk.cut()
                return written

        io.FileIO = File  # type: ignore[misc]

    def _watched(self, function: Any) -> Any:
        def operation(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            if not isinstance(arguments[0], int) and str(self.folder) in os.fspath(arguments[0]):
                self.cut()
            return result

        return operation

    def _listed(self) -> dict[str, int]:
        listed = {entry.name: entry.inode() for entry in os.scandir(self.folder) if entry.is_file()}
        for name, inode in listed.items():
            if inode not in self._pins:
                self._pins[inode] = self._plain_open(self.folder / name, os.O_RDONLY)
        return listed

    def cut(self) -> None:
        """Keeps the states that a power cut at this moment may leave."""
        with self._lock:
            self.count += 1
            # Where another thread removes a file meanwhile, its own cut follows.
            with contextlib.suppress(FileNotFoundError):
                for state in self._states():
                    self._keep(state)

    def _states(self) -> Iterator[Entries]:
        now = self._listed()
        seen = {name: (self.folder / name).read_bytes() for name in now}
        yield seen  # all of it: what a kill leaves
        yield {
            name: self._content.get(inode, b"") for name, inode in self._names.items()
        }  # only what was synced
        current = {inode: seen[name] for name, inode in now.items()}
        for _ in range(self._mixes):
            yield self._mixed(now, current)

    def _mixed(self, now: dict[str, int], current: dict[int, bytes]) -> Entries:
        """Some of the names that changed since the last sync, in any order, with torn contents."""
        mixed = dict(self._names)
        for name in sorted(set(now) ^ set(self._names) | {n for n in now if self._names.get(n) != now[n]}):
            if self._rng.random() < 0.5:
                if name in now:
                    mixed[name] = now[name]
                else:
                    mixed.pop(name)
        return {
            name: self._torn(self._content.get(inode), current.get(inode, b""))
            for name, inode in mixed.items()
        }

    def _torn(self, synced: bytes | None, current: bytes) -> bytes:
        """What was synced stays.

        Of a content that was not, any part may be there, zeros in place of the rest.
        """
        if synced == current:
            return current
        part = self._rng.randrange(len(current) + 1)
        old = synced if synced is not None else bytes(len(current))
        return current[:part] + old[part:]

    def _keep(self, state: Entries) -> None:
        summed = hashlib.sha256()
        for name in sorted(state):
            if not name.startswith(("telemetry", "lock")):
                summed.update(name.encode() + b"\0" + hashlib.sha256(state[name]).digest())
        target = self.kept / summed.hexdigest()[:32]
        if target.exists():
            return
        target.mkdir(parents=True)
        for name, content in state.items():
            (target / name).write_bytes(content)


def power(bench: Bench, rng: random.Random, most: int) -> Tally:
    """Up to `most` distinct states, each of which the same command must bring to the same end."""
    tally, wanted = Tally(f"power loss, {bench.name}"), kit.digest_of(bench.finished())
    kept, run = bench.root / f"states-{bench.name}", prepared(bench)
    # Every operation gives a few states; so many mixes that there are enough of them.
    watched: Any = Disk(run, kept, rng, mixes=1 + most // 30)
    recorded: Callable[[], int] = trained(bench, run, watched)
    outcome = in_child(recorded, bench.root, 300)
    assert outcome.code == 0, outcome.err
    states = sorted(kept.iterdir())
    rng.shuffle(states)
    for state in states[:most]:
        kit.remove(run)
        state.rename(run)
        if not (run / "plan.json").exists():
            continue  # the cut came before the run had begun
        again = in_child(command(*bench.arguments(run)), bench.root)
        found = again.problem() or (again.err.strip()[-200:] if again.code else None)
        if found is None and kit.digest_of(run) != wanted:
            found = "another digest"
        tally.check(f"state {state.name[:8]}", found)
    return tally
