"""Where blocks rest: one safetensors file each on disk, and in RAM as well when the tier is `host`.

Files are read and written past the page cache (O_DIRECT) in large requests from page-aligned buffers, and through it where
the file system refuses. A block's first read in a process checks its digest, every read its size and header.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lowmem.arena import ArenaLayout, aligned_buffer
from lowmem.errors import StoreError
from lowmem.run_dir import FileRecord, RunDir
from lowmem.units import MIB

REQUEST_BYTES = 16 * MIB  # of one read or write
NO_DIGEST = "0" * 64  # of a working copy


class DiskStore:
    """Blocks by key ("block-0", ..., "shared"), in files of the run folder. Buffers are host memory from `aligned_buffer`."""

    def __init__(self, run_dir: RunDir, layouts: Mapping[str, ArenaLayout], files: Mapping[str, FileRecord]) -> None:
        self.run_dir, self.layouts = run_dir, layouts
        self.files = dict(files)  # the newest file of each block: may be ahead of what is committed
        self._verified = set[str]()
        self.read_bytes = self.written_bytes = 0

    def read(self, key: str, buffer: Tensor) -> None:
        """Fills `buffer` [total_bytes], or as much as fits in it of the front. Raises StoreError: file missing, torn, of another layout, or changed.

        A part tells nothing of the digest: whoever commits what comes of it has read the whole too.
        """
        record = self.files[key]
        path = self.run_dir.path / record.name
        header, data = self.layouts[key].header(), bytes_of(buffer)
        self.read_bytes += _transfer(path, os.O_RDONLY, header, data, record.num_bytes)
        if record.name not in self._verified and len(data) == self.layouts[key].total_bytes:
            if hashlib.sha256(data).hexdigest() != record.sha256:
                raise StoreError(f"{path}: its data differ from what was committed; restore it from a copy; nothing was overwritten")
            self._verified.add(record.name)

    def write(self, key: str, buffer: Tensor, visits_done: int, durable: bool = True) -> FileRecord:
        """A new file with the bytes of `buffer`, on the disk when this returns. It counts only once a commit names it.

        Not `durable`: a working copy that a later write of the visit replaces, so neither fsync nor digest; no commit may name it.
        """
        name = self.run_dir.file_name(key, visits_done)
        header, data = self.layouts[key].header(), bytes_of(buffer)
        self.written_bytes += _transfer(self.run_dir.path / name, os.O_WRONLY | os.O_CREAT, header, data, None, durable)
        record = FileRecord(name=name, num_bytes=len(header) + len(data), sha256=hashlib.sha256(data).hexdigest() if durable else NO_DIGEST)
        self._verified.add(name)
        self.files[key] = record
        return record


class HostStore(DiskStore):
    """The same, with every block also in RAM, so that reads cost a copy. Files are written all the same: they are the checkpoint."""

    def __init__(self, run_dir: RunDir, layouts: Mapping[str, ArenaLayout], files: Mapping[str, FileRecord]) -> None:
        super().__init__(run_dir, layouts, files)
        self._copies: dict[str, Tensor] = {}

    def read(self, key: str, buffer: Tensor) -> None:
        if key not in self._copies:
            whole = aligned_buffer(self.layouts[key].total_bytes)
            super().read(key, whole)
            self._copies[key] = whole
        buffer.copy_(self._copies[key][: buffer.numel()])

    def write(self, key: str, buffer: Tensor, visits_done: int, durable: bool = True) -> FileRecord:
        self._keep(key, buffer)
        return super().write(key, buffer, visits_done) if durable else self.files[key]

    def _keep(self, key: str, buffer: Tensor) -> None:
        if key not in self._copies:
            self._copies[key] = aligned_buffer(buffer.numel())
        self._copies[key].copy_(buffer)


def bytes_of(buffer: Tensor) -> memoryview:
    return memoryview(buffer.numpy())  # type: ignore[arg-type]


def _transfer(path: Path, flags: int, header: bytes, data: memoryview, expected_bytes: int | None, sync: bool = True) -> int:
    """Reads (O_RDONLY) or writes header and data. Returns the bytes moved."""
    reading = flags == os.O_RDONLY
    page_header = aligned_buffer(len(header))
    head = bytes_of(page_header)
    if not reading:
        head[:] = header
    try:
        with _open(path, flags) as file:
            found = os.fstat(file.fileno()).st_size
            if reading and found != expected_bytes:
                raise StoreError(f"{path}: expected {expected_bytes} bytes, found {found} bytes; restore it from a copy; nothing was overwritten")
            for part in (head, data):
                for start in range(0, len(part), REQUEST_BYTES):
                    request = part[start : start + REQUEST_BYTES]
                    moved = file.readinto(request) if reading else file.write(request)
                    if moved != len(request):
                        raise StoreError(
                            f"{path}: moved {moved} of {len(request)} bytes in one request; the disk is full or failing; free space, then run again"
                        )
            if not reading and sync:
                os.fsync(file.fileno())
    except OSError as problem:
        raise StoreError(f"{path}: {problem.strerror}; the last commit is kept: mend this, then run the same command again") from None
    if reading and bytes(head) != header:
        raise StoreError(f"{path}: its header is not that of this run's block; restore it from a copy; nothing was overwritten")
    return len(header) + len(data)


def _open(path: Path, flags: int) -> io.FileIO:
    def opener(name: str, _: int) -> int:
        direct = getattr(os, "O_DIRECT", 0)
        try:
            return os.open(name, flags | direct | getattr(os, "O_BINARY", 0), 0o644)
        except OSError:
            if not direct:
                raise
            return os.open(name, flags, 0o644)

    return io.FileIO(str(path), "rb" if flags == os.O_RDONLY else "wb", opener=opener)
