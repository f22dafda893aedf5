"""Sees that a rank has died or given up, and ends this process then, with one line that names it.

Every rank says in the launcher's store, twice a second, that it lives. A thread looks, because compute and
exchanges may wait for a long time. It ends the process as a kill would: whatever is under way is not
committed, and the same command goes on from the last commit.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
from torch.distributed.distributed_c10d import Store

BEAT_S = 0.5
SILENT_S = 10.0  # a rank of another machine that says nothing for so long counts as dead
ALONE_S = 3.0  # between the first interrupted rank and the last, where a user or a cluster interrupts all
LEAVING_S = 2.0  # a rank that gives up waits so long, so that the others hear why
GO_ON = "what is committed is kept; run the same command again to go on, also with fewer ranks"


class Watch:
    """This rank's signs of life, and its look at those of the others. `store` is its own connection."""

    def __init__(self, store: Store, rank: int, size: int, say: Callable[[str], None]) -> None:
        self._store, self.rank, self.size, self._say = store, rank, size, say
        self._host, self._lock = socket.gethostname(), threading.Lock()
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> its last sign, and when it was new
        self._left: dict[int, dict[str, Any]] = {}  # rank -> why it ended
        self._ended = threading.Event()
        self._beat(0)
        self._thread = threading.Thread(target=self._run, name="lowmem-watch", daemon=True)
        self._thread.start()

    # --------------------------------------------------------------------------------------------------------
    # This rank

    def leave(self, why: str, message: str = "", code: int = 1) -> None:
        """Says why this rank ends: "done", "failed", "interrupted", or "stopped" because of another rank."""
        content = json.dumps({"why": why, "message": message, "code": code})
        with self._lock:
            self._store.set(f"left/{self.rank}", content)
            self._left[self.rank] = json.loads(content)

    def missing(self) -> list[int]:
        """Ranks that have not joined yet."""
        with self._lock:
            return [rank for rank in range(self.size) if not self._store.check([f"alive/{rank}"])]

    def wait_until_others_left(self, seconds: float | None = None) -> None:
        """Until each other rank has said why it ends. If one has died, this process ends meanwhile."""
        until = None if seconds is None else time.monotonic() + seconds
        while len(self._left) < self.size and (until is None or time.monotonic() < until):
            time.sleep(0.05)

    def end(self) -> None:
        self._ended.set()

    # --------------------------------------------------------------------------------------------------------
    # The thread

    def _run(self) -> None:
        count = 0
        while not self._ended.wait(BEAT_S):
            count += 1
            try:
                self._beat(count)
                self._look()
            except RuntimeError:  # the store is gone, with the rank or the launcher that held it
                if self._ended.is_set() or self._may_be_over():
                    return
                self._stop(0, "ended, or its launcher did", 1, connected=False)

    def _may_be_over(self) -> bool:
        return self.rank in self._left and self._left[self.rank]["why"] in ("done", "failed")

    def _beat(self, count: int) -> None:
        sign = {"host": self._host, "pid": os.getpid(), "count": count}
        with self._lock:
            self._store.set(f"alive/{self.rank}", json.dumps(sign))

    def _look(self) -> None:
        dead = {rank: text for rank in range(self.size) if rank != self.rank and (text := self._fault(rank))}
        if not dead:
            return
        if self._may_be_over():  # this rank has nothing to lose any more
            self._left.update({rank: {"why": "failed", "message": text} for rank, text in dead.items()})
            return
        culprit = min(dead)
        left = self._left.get(culprit, {})
        self._stop(culprit, dead[culprit], int(left.get("code", 1)), dead=set(dead))

    def _fault(self, rank: int) -> str:
        """What is wrong with another rank, in words; nothing while it lives, or has ended well."""
        left = self._left.get(rank) or self._read(f"left/{rank}")
        if left is not None:
            self._left[rank] = left
            if left["why"] == "failed":
                return str(left["message"])
            alone = left["why"] == "interrupted" and self.rank not in self._left
            return "was interrupted" if alone and self._silent_s(rank, "interrupted") > ALONE_S else ""
        sign = self._read(f"alive/{rank}")
        if sign is None:  # it has not joined yet
            return ""
        if sign["host"] == self._host and not _lives(int(sign["pid"])):
            return "died" if self._read(f"left/{rank}") is None else ""
        return f"said nothing for {SILENT_S:.0f} s" if self._silent_s(rank, str(sign)) > SILENT_S else ""

    def _silent_s(self, rank: int, sign: str) -> float:
        """Seconds since a rank's last sign was a new one."""
        now = time.monotonic()
        before, since = self._seen.get(rank, ("", now))
        if sign != before:
            since = now
            self._seen[rank] = sign, since
        return now - since

    def _read(self, key: str) -> dict[str, Any] | None:
        with self._lock:
            if not self._store.check([key]):
                return None
            content: dict[str, Any] = json.loads(self._store.get(key))
            return content

    def _stop(
        self, culprit: int, text: str, code: int, dead: set[int] | None = None, connected: bool = True
    ) -> None:
        """Ends this process. The lowest rank that lives says which rank it was."""
        lost = dead or {culprit}
        speaks = self.rank == min(rank for rank in range(self.size) if rank not in lost)
        failed = self._left.get(culprit, {}).get("why") == "failed"
        if speaks and not (failed and culprit == 0):  # rank 0 has said itself why it failed
            self._say(f"rank {culprit}: {text}" if failed else f"rank {culprit} {text}; {GO_ON}")
        if connected:
            try:
                self.leave("stopped", code=code)
                time.sleep(LEAVING_S if self.rank == 0 else 0.0)  # rank 0 may hold the store
            except RuntimeError:
                pass
        os._exit(code)


def _lives(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
