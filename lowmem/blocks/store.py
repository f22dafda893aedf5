"""Keeps the blocks that are not in compute: each in one file on disk, and with tier `host` also in RAM.

`BlockStream` knows only the interface, `Store`. A `DiskStore` moves files in chunks, on a few reading and a
few writing threads; bytes of a device pass a ring of host chunks on their way. It checks a file's size and
header at every read, and its digest at the first whole read in a process. A `HostStore` holds a `DiskStore`
and one more copy of every block in RAM.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from torch import Tensor

from lowmem.blocks.arena import ArenaLayout, aligned_buffer
from lowmem.blocks.block_file import (
    ChunkRequests,
    all_in_chunks,
    chunk_digest,
    in_chunks,
    open_file,
    removed_if_it_fails,
    whole_digest,
)
from lowmem.blocks.run_dir import FileRecord, RunDir
from lowmem.blocks.seal import BACK
from lowmem.blocks.staging import IN, OUT, THREADS, Pace, Ring
from lowmem.blocks.traffic import Traffic, TransferTimes
from lowmem.blocks.unit import Pages
from lowmem.errors import StoreError
from lowmem.files import refusals_of
from lowmem.units import MIB, PAGE

DIGEST_PIECE = 1 * MIB  # read at once for a digest, on each thread


class Store(ABC):
    """Blocks by key ("block-0", ..., "shared"), each a flat buffer of bytes (uint8, [total_bytes]).

    A buffer is host memory from `aligned_buffer`, or memory of a device that `ring` copies to and from.
    """

    ring: Ring | None
    files: dict[str, FileRecord]  # the newest file of each block; it may be ahead of what is committed

    @abstractmethod
    def read(self, key: str, buffer: Tensor) -> None:
        """Fills `buffer` with the block's newest bytes: all of them, or as many of the first as fit in.

        Raises StoreError if the file is missing, torn, changed, or of another layout. Only a whole read
        checks the digest.
        """

    @abstractmethod
    def write(self, key: str, buffer: Tensor, visits_done: int) -> FileRecord:
        """Writes the block's bytes to a new file, which is on the disk when this returns.

        Returns its record; a block whose bytes have not changed keeps its file. The file counts only once a
        commit names it. Kernels that write the buffer must have finished. Raises StoreError.
        """

    @abstractmethod
    def read_pages(self, key: str, parts: Sequence[tuple[Pages, Tensor]], rewritten: bool) -> None:
        """Fills buffers [num_bytes] with pages of the block's data, or with the bytes alone that count.

        `rewritten`: as `write_pages` has left them, since `begin`. Raises StoreError as `read` does, but sees
        the digest only where this process has not seen it yet.
        """

    @abstractmethod
    def begin(self, key: str, visits_done: int) -> None:
        """A new file of the block is to be written in pages, all of its rows at least once, until `end`.

        Called again with the same `visits_done` it does nothing. Raises StoreError.
        """

    @abstractmethod
    def write_pages(self, key: str, parts: Sequence[tuple[Pages, Tensor]], more: bool = False) -> None:
        """Writes the bytes that pages are about, and leaves all others in them as they are.

        Calls come one after another. `more`: the next one is about the same block, and a page that is not
        full yet may wait for it. Raises StoreError.
        """

    @abstractmethod
    def end(self, key: str, visits_done: int) -> FileRecord:
        """Makes the new file durable and returns its record: see `write`. Raises StoreError."""

    @abstractmethod
    def take_over(self, key: str, buffer: Tensor) -> Tensor:
        """Returns a buffer with the same bytes that `write` may be given instead.

        Where that is another buffer, the store has copied the bytes, and the caller may use its own again.
        """

    @abstractmethod
    def copy_out(self, buffer: Tensor, host: Tensor) -> None:
        """Copies `buffer` to host memory. Kernels that write it must have finished."""

    @abstractmethod
    def traffic(self) -> Traffic:
        """Bytes moved since the store was opened."""

    @abstractmethod
    def transfer_s(self) -> TransferTimes:
        """Seconds that this traffic took."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """How bytes move, for the run's record."""

    @abstractmethod
    def close(self) -> None:
        """Ends the store's threads and frees its memory. Removes files that were begun and not ended."""


class Edge:
    """A page of which some bytes are to be written."""

    def __init__(self) -> None:
        self.page = aligned_buffer(PAGE)
        self._there = np.zeros(PAGE, dtype=bool)

    def add(self, page: Tensor, part: slice) -> None:
        """Some bytes of `page` [PAGE]."""
        self.page.numpy()[part] = page.numpy()[part]
        self._there[part] = True

    @property
    def full(self) -> bool:
        return bool(self._there.all())

    def fill_up(self, page: Tensor) -> None:
        """Takes from `page` [PAGE] what is not there yet."""
        np.copyto(self.page.numpy(), page.numpy(), where=~self._there)


class DiskStore(Store):
    """Blocks in files of the run folder."""

    def __init__(
        self,
        run_dir: RunDir,
        layouts: Mapping[str, ArenaLayout],
        files: Mapping[str, FileRecord],
        ring: Ring | None = None,
        paces: tuple[Pace, Pace] | None = None,
        checked: bool = False,
    ) -> None:
        """`paces`: the least time of reads and of writes, to play a slower disk. `checked`: this process has
        just written `files`, or has read them whole and found them to be what was committed.
        """
        self.run_dir, self.layouts, self.ring, self.files = run_dir, layouts, ring, dict(files)
        self._headers = {key: layout.header() for key, layout in layouts.items()}
        self._requests = ChunkRequests()
        # files that this process has written, or whose digest it has checked
        self._verified = {record.name for record in files.values()} if checked else set[str]()
        self._begun = dict[str, str]()  # the files that are being written in pages
        self._first_digest = dict[str, bytes]()  # of the first chunk of each block's last durable write
        self._read_pace, self._write_pace = paces or (Pace(), Pace())
        # Threads of their own for each way, so that a read never stands in line behind a long write.
        self._readers = ThreadPoolExecutor(THREADS, "lowmem-reading")
        self._writers = ThreadPoolExecutor(THREADS, "lowmem-writing")
        self._counting = threading.Lock()  # several threads of a stream read and write
        self._moved, self._taken_s = [0, 0], [0.0, 0.0]  # read, written
        # of pages that wait for the rest of them, by position
        self._edges = dict[str, defaultdict[int, Edge]]()

    def read(self, key: str, buffer: Tensor) -> None:
        record, header = self.files[key], self._headers[key]
        path, source = self.run_dir.path / record.name, self.run_dir.file_path(record.name)
        whole = buffer.numel() == self.layouts[key].total_bytes
        # The digest covers all of the data, so a read of the weights alone cannot check it, and must not
        # mark the file as checked either. Whatever is committed was read whole before it was trained.
        verify = whole and record.name not in self._verified
        began = time.perf_counter()
        with refusals_of(path, StoreError):
            self._check_header(key)
            digests = self._read_data(source, len(header), buffer, verify)
        self._count_read(buffer.numel(), time.perf_counter() - began)
        if verify:
            if whole_digest(digests) != record.digest:
                raise StoreError(f"{path}: its data differ from what was committed; {BACK}")
            self._verified.add(record.name)

    def write(self, key: str, buffer: Tensor, visits_done: int) -> FileRecord:
        if self._unchanged(key, buffer):
            return self.files[key]
        name, began = self.run_dir.file_name(key, visits_done), time.perf_counter()
        path = self.run_dir.path / name
        self._create(path, key)
        with refusals_of(path, StoreError), removed_if_it_fails(path):
            digests = self._write_data(path, len(self._headers[key]), buffer)
            # Here and not at the commit: the disk is done with it while the next block trains.
            _sync(path)
        self._count_written(buffer.numel(), time.perf_counter() - began)
        self._first_digest[key] = digests[0]
        return self._recorded(key, name, whole_digest(digests))

    def read_pages(self, key: str, parts: Sequence[tuple[Pages, Tensor]], rewritten: bool) -> None:
        record, header = self.files[key], self._headers[key]
        name = self._begun[key] if rewritten else record.name
        if name not in self._verified:
            self._check(key)
        source, began = self.run_dir.file_path(name), time.perf_counter()

        def read(pages: Pages, buffer: Tensor, part: slice) -> None:
            with self._to_device(buffer[part]) as chunk, self._read_pace(chunk.numel()):
                self._requests.read(source, len(header) + pages.first + part.start, chunk)

        with refusals_of(self.run_dir.path / name, StoreError):
            all_in_chunks(self._readers, parts, read)
        self._count_read(sum(pages.num_bytes for pages, _ in parts), time.perf_counter() - began)

    def begin(self, key: str, visits_done: int) -> None:
        name = self.run_dir.file_name(key, visits_done)
        if self._begun.get(key) == name:
            return
        path = self.run_dir.path / name
        self._create(path, key)
        with refusals_of(path, StoreError), removed_if_it_fails(path), open_file(path, os.O_WRONLY) as file:
            # Padding is never written, and is zero in every file.
            os.truncate(file.fileno(), len(self._headers[key]) + self.layouts[key].total_bytes)
        self._begun[key] = name
        self._verified.add(name)

    def write_pages(self, key: str, parts: Sequence[tuple[Pages, Tensor]], more: bool = False) -> None:
        path, skipped = self.run_dir.path / self._begun[key], len(self._headers[key])
        began, whole = time.perf_counter(), list[tuple[Pages, Tensor]]()
        for pages, buffer in parts:
            inner = pages.whole
            inside = Pages(pages.first + inner.start, pages.first + inner.stop)
            whole.append((inside, buffer[inner]))

        def write(pages: Pages, buffer: Tensor, part: slice) -> None:
            with self._from_device(buffer[part]) as chunk, self._write_pace(chunk.numel()):
                self._requests.write(path, skipped + pages.first + part.start, chunk)

        with refusals_of(path, StoreError):  # not removed if it fails: other units are read from it meanwhile
            all_in_chunks(self._writers, whole, write)
            self._write_edges(key, parts, more)
        num_bytes = sum(inside.stop - inside.start for inside, _ in whole)
        self._count_written(num_bytes, time.perf_counter() - began)

    def end(self, key: str, visits_done: int) -> FileRecord:
        name, began = self._begun.pop(key), time.perf_counter()
        path = self.run_dir.path / name
        with refusals_of(path, StoreError):
            _sync(path)
            self._count_written(0, time.perf_counter() - began)
            digest = self._digest_of(path, key)
        return self._recorded(key, name, digest)

    def take_over(self, key: str, buffer: Tensor) -> Tensor:
        return buffer

    def copy_out(self, buffer: Tensor, host: Tensor) -> None:
        # Copies with NumPy, here and below: torch would start a team of compute threads for each of ours
        # (see `aligned_buffer`).
        def copy_chunk(part: slice) -> None:
            with self._from_device(buffer[part]) as chunk:
                host.numpy()[part] = chunk.numpy()

        in_chunks(self._writers, buffer.numel(), copy_chunk)

    def copy_in(self, host: Tensor, buffer: Tensor) -> None:
        """Copies host memory to `buffer`."""

        def copy_chunk(part: slice) -> None:
            with self._to_device(buffer[part]) as chunk:
                chunk.numpy()[:] = host.numpy()[part]

        in_chunks(self._readers, buffer.numel(), copy_chunk)

    def traffic(self) -> Traffic:
        read, written = self._moved
        moved = Traffic(disk_read_bytes=read, disk_written_bytes=written)
        return moved if self.ring is None else moved + self.ring.traffic()

    def transfer_s(self) -> TransferTimes:
        read_s, written_s = self._taken_s
        taken = TransferTimes(disk_read_s=read_s, disk_written_s=written_s)
        return taken if self.ring is None else taken + self.ring.transfer_s()

    def facts(self) -> dict[str, Any]:
        ring = {} if self.ring is None else self.ring.facts()
        return {"past_page_cache": self._requests.direct, **ring}

    def close(self) -> None:
        self._readers.shutdown(wait=True)
        self._writers.shutdown(wait=True)
        for name in self._begun.values():  # never whole, so no commit names it, and the disk may be full
            with contextlib.suppress(OSError):
                (self.run_dir.path / name).unlink(missing_ok=True)
        if self.ring is not None:
            self.ring.close()

    # --------------------------------------------------------------------------------------------------------

    def _count(self, way: int, num_bytes: int, taken_s: float) -> None:
        with self._counting:
            self._moved[way] += num_bytes
            self._taken_s[way] += taken_s

    def _count_read(self, num_bytes: int, taken_s: float = 0.0) -> None:
        self._count(0, num_bytes, taken_s)

    def _count_written(self, num_bytes: int, taken_s: float = 0.0) -> None:
        self._count(1, num_bytes, taken_s)

    def _check(self, key: str) -> None:
        """Looks at a file's size, header and digest before it is read in pages. Raises StoreError."""
        record = self.files[key]
        path, source = self.run_dir.path / record.name, self.run_dir.file_path(record.name)
        with refusals_of(path, StoreError):
            self._check_header(key)
            if self._digest_of(source, key) != record.digest:
                raise StoreError(f"{path}: its data differ from what was committed; {BACK}")
        self._verified.add(record.name)

    def _check_header(self, key: str) -> None:
        """Raises OSError, or StoreError unless the newest file has the right size and header."""
        record, header = self.files[key], self._headers[key]
        path, source = self.run_dir.path / record.name, self.run_dir.file_path(record.name)
        found = _size_of(source)
        if found != record.num_bytes:
            raise StoreError(f"{path}: expected {record.num_bytes} bytes, found {found} bytes; {BACK}")
        head = aligned_buffer(len(header))
        self._requests.read(source, 0, head)
        self._count_read(len(header))
        if bytes(head.numpy()) != header:
            raise StoreError(f"{path}: its header is not that of this run's block; {BACK}")

    def _create(self, path: Path, key: str) -> None:
        """Makes a new file that begins with the block's header. Nobody's file is overwritten."""
        with refusals_of(path, StoreError):
            open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL).close()
        with refusals_of(path, StoreError), removed_if_it_fails(path):
            head = aligned_buffer(len(self._headers[key]))
            head.numpy()[:] = memoryview(self._headers[key])
            self._requests.write(path, 0, head)
        self._count_written(head.numel())

    def _recorded(self, key: str, name: str, digest: str) -> FileRecord:
        """The record of a file that is on the disk, which is now the block's newest."""
        header = self._headers[key]
        self._verified.add(name)
        self.files[key] = FileRecord(
            name=name,
            num_bytes=len(header) + self.layouts[key].total_bytes,
            header=hashlib.sha256(header).hexdigest(),
            digest=digest,
        )
        return self.files[key]

    def _digest_of(self, path: Path, key: str) -> str:
        """The digest of a file's data, read again a piece at a time."""
        position, num_bytes = len(self._headers[key]), self.layouts[key].total_bytes

        def digest(part: slice) -> bytes:
            summed, piece = xxhash.xxh3_128(), aligned_buffer(DIGEST_PIECE)
            for start in range(part.start, min(part.stop, num_bytes), DIGEST_PIECE):
                some = piece[: min(start + DIGEST_PIECE, part.stop, num_bytes) - start]
                with self._read_pace(some.numel()):
                    self._requests.read(path, position + start, some)
                summed.update(memoryview(some.numpy()))  # type: ignore[arg-type]
            return summed.digest()

        began = time.perf_counter()
        digests = in_chunks(self._readers, num_bytes, digest)
        self._count_read(num_bytes, time.perf_counter() - began)
        return whole_digest(digests)

    def _write_edges(self, key: str, parts: Sequence[tuple[Pages, Tensor]], more: bool) -> None:
        """Writes the pages that parts fill together. What else is in the other ones is read before."""
        path, skipped = self.run_dir.path / self._begun[key], len(self._headers[key])
        waiting = self._edges.setdefault(key, defaultdict(Edge))
        for pages, buffer in parts:
            for part in pages.edges:
                first = part.start // PAGE * PAGE
                with self._from_device(buffer[first : first + PAGE]) as chunk:
                    waiting[skipped + pages.first + first].add(
                        chunk, slice(part.start - first, part.stop - first)
                    )
        for position, edge in list(waiting.items()):
            if not edge.full and more:
                continue
            if not edge.full:
                page = aligned_buffer(PAGE)
                self._requests.read(path, position, page)
                self._count_read(PAGE)
                edge.fill_up(page)
            self._requests.write(path, position, edge.page)
            self._count_written(PAGE)
            del waiting[position]

    def _unchanged(self, key: str, buffer: Tensor) -> bool:
        """Tells whether the newest file holds exactly these bytes.

        Training changes every chunk, so the first one settles nearly every call; equal bytes there prove
        nothing about the rest.
        """
        first = self._first_digest.get(key)

        def digest_chunk(part: slice) -> bytes:
            with self._from_device(buffer[part]) as chunk:
                return chunk_digest(chunk)

        if first is None or in_chunks(self._writers, 1, digest_chunk) != [first]:
            return False
        digests = in_chunks(self._writers, buffer.numel(), digest_chunk)
        return whole_digest(digests) == self.files[key].digest

    def _read_data(self, path: Path, position: int, buffer: Tensor, digested: bool) -> list[bytes]:
        """Fills `buffer` from `position` on; returns the chunks' digests, empty ones if none are wanted."""

        def read_chunk(part: slice) -> bytes:
            with self._to_device(buffer[part]) as chunk, self._read_pace(chunk.numel()):
                self._requests.read(path, position + part.start, chunk)
                return chunk_digest(chunk) if digested else b""

        return in_chunks(self._readers, buffer.numel(), read_chunk)

    def _write_data(self, path: Path, position: int, buffer: Tensor) -> list[bytes]:
        """Writes `buffer` at `position`; returns the chunks' digests."""

        def write_chunk(part: slice) -> bytes:
            with self._from_device(buffer[part]) as chunk, self._write_pace(chunk.numel()):
                self._requests.write(path, position + part.start, chunk)
                return chunk_digest(chunk)

        return in_chunks(self._writers, buffer.numel(), write_chunk)

    def _to_device(self, part: Tensor) -> AbstractContextManager[Tensor]:
        """Host memory to fill: `part` itself, or a chunk of the ring that is copied to it afterwards."""
        ring = self._ring_of(part)
        return nullcontext(part) if ring is None else ring.to_device(part)

    def _from_device(self, part: Tensor) -> AbstractContextManager[Tensor]:
        """Host memory with the bytes of `part`: `part` itself, or a chunk of the ring."""
        ring = self._ring_of(part)
        return nullcontext(part) if ring is None else ring.from_device(part)

    def _ring_of(self, part: Tensor) -> Ring | None:
        passes = self.ring is not None and part.device.type == self.ring.device.torch.type
        return self.ring if passes else None


class HostStore(Store):
    """Blocks in RAM, so that a read costs a copy; their files, the checkpoint, are kept by a `DiskStore`.

    A block is read from disk when it is first asked for. Working copies never reach the disk.
    """

    def __init__(self, disk: DiskStore, lockable_bytes: int = 0) -> None:
        """`lockable_bytes`: as much of the copies may be page-locked, so that they need no ring."""
        self.disk, self.ring, self.files = disk, disk.ring, disk.files
        self._copies: dict[str, Tensor] = {}
        self._opening = threading.Lock()
        self._lockable_bytes, self._locked = lockable_bytes, set[str]()

    def read(self, key: str, buffer: Tensor) -> None:
        self._copy(key, [(buffer, self._copy_of(key)[: buffer.numel()])], IN)

    def read_pages(self, key: str, parts: Sequence[tuple[Pages, Tensor]], rewritten: bool) -> None:
        copy = self._copy_of(key)
        pairs = [(pages.inside(buffer), copy[pages.start : pages.stop]) for pages, buffer in parts]
        self._copy(key, pairs, IN)

    def _copy(self, key: str, pairs: list[tuple[Tensor, Tensor]], way: int) -> None:
        """To each target from its source: buffers from parts of the block's copy (IN), or the other way."""
        if self.ring is not None and self._direct(key, pairs):
            self.ring.copy(pairs, way)
            return
        through = self.disk.copy_in if way == IN else self.disk.copy_out
        for target, source in pairs:
            through(source, target)

    def _direct(self, key: str, pairs: list[tuple[Tensor, Tensor]]) -> bool:
        """Whether the copies cross the link, from or to memory that is page-locked."""
        kinds = {tensor.device.type for pair in pairs for tensor in pair}
        return key in self._locked and self.ring is not None and kinds == {"cpu", self.ring.device.torch.type}

    def _room(self, key: str, num_bytes: int) -> Tensor:
        """Memory for a block's copy, page-locked as far as that is allowed."""
        room = aligned_buffer(num_bytes)
        allowed = num_bytes <= self._lockable_bytes
        if self.ring is not None and allowed and self.ring.device.lock(room):
            self._lockable_bytes -= num_bytes
            self._locked.add(key)
        return room

    def begin(self, key: str, visits_done: int) -> None:
        pass

    def write_pages(self, key: str, parts: Sequence[tuple[Pages, Tensor]], more: bool = False) -> None:
        copy = self._copy_of(key)
        pairs = [(copy[pages.start : pages.stop], pages.inside(buffer)) for pages, buffer in parts]
        self._copy(key, pairs, OUT)

    def end(self, key: str, visits_done: int) -> FileRecord:
        return self.disk.write(key, self._copy_of(key), visits_done)

    def write(self, key: str, buffer: Tensor, visits_done: int) -> FileRecord:
        return self.disk.write(key, self.take_over(key, buffer), visits_done)

    def take_over(self, key: str, buffer: Tensor) -> Tensor:
        copy = self._copies.get(key)
        if copy is None:
            copy = self._copies[key] = self._room(key, buffer.numel())
        if buffer is not copy:
            self._copy(key, [(copy, buffer)], OUT)
        return copy

    def _copy_of(self, key: str) -> Tensor:
        with self._opening:  # two threads may ask for the same block
            if key not in self._copies:
                whole = self._room(key, self.disk.layouts[key].total_bytes)
                self.disk.read(key, whole)  # the whole block, so this checks its digest
                self._copies[key] = whole
        return self._copies[key]

    def copy_out(self, buffer: Tensor, host: Tensor) -> None:
        self.disk.copy_out(buffer, host)

    def traffic(self) -> Traffic:
        return self.disk.traffic()

    def transfer_s(self) -> TransferTimes:
        return self.disk.transfer_s()

    def facts(self) -> dict[str, Any]:
        return self.disk.facts()

    def close(self) -> None:
        for key in self._locked:
            if self.ring is not None:
                self.ring.device.unlock(self._copies[key])
        self._locked.clear()
        self.disk.close()
        self._copies.clear()


def _sync(path: Path) -> None:
    with open_file(path, os.O_WRONLY) as file:
        os.fsync(file.fileno())


def _size_of(path: Path) -> int:
    """By an opened handle, so that a file without read permission is said to be that."""
    with open_file(path, os.O_RDONLY) as file:
        return os.fstat(file.fileno()).st_size
