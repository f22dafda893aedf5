"""The lock of a run folder: one process trains in it at a time.

The system frees the lock when its process ends, however it ends. To look whether it is held needs neither a
write nor the lock file. The file is opened without following a link, and is never emptied.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from lowmem.files import open_regular

WAIT_S = 0.5  # `lowmem status` holds the lock for an instant when it looks at it
POLL_S = 0.02


class FolderLock:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> bool:
        """Returns whether the lock is now this process's. Raises OSError where it cannot be made."""
        handle = open_regular(self.path, os.O_RDWR | os.O_CREAT)
        until = time.monotonic() + WAIT_S
        while not _take(handle, shared=False):
            if time.monotonic() > until:
                os.close(handle)
                return False
            time.sleep(POLL_S)
        self._handle = handle
        return True

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def is_held(self) -> bool:
        """Whether a process holds it now. A lock that cannot be opened for reading counts as free."""
        try:
            handle = open_regular(self.path)
        except OSError:
            return False
        try:
            return not _take(handle, shared=True)
        finally:
            os.close(handle)


if sys.platform == "win32":
    import msvcrt

    def _take(handle: int, shared: bool) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _take(handle: int, shared: bool) -> bool:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
