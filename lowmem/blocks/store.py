"""Where blocks rest: one safetensors file each on disk, and in RAM as well when the tier is `host`.

Files move in chunks, a few at a time, past the page cache (O_DIRECT) or through it where the file system
refuses. Bytes of a device pass a ring of host chunks on their way. A block's first read in a process checks
its digest, every read its size and header; the digest is computed chunk by chunk on the threads that read and
write, so that it costs no time of its own.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import xxhash
from torch import Tensor

from lowmem.blocks.arena import ArenaLayout, aligned_buffer
from lowmem.blocks.run_dir import FileRecord, RunDir
from lowmem.blocks.staging import CHUNK_BYTES, THREADS, Pace, Ring
from lowmem.errors import StoreError

REFUSED_DIRECT = (
    errno.EINVAL,
    errno.ENOTSUP,
)  # what O_DIRECT meets at open, or at the first request, where it is not supported
NO_DIGEST = "0" * 64  # of a working copy
T = TypeVar("T")


class DiskStore:
    """Blocks by key ("block-0", ..., "shared"), in files of the run folder.

    Buffers are uint8: host memory from `aligned_buffer`, or memory of another kind that `ring` copies from
    and to.
    """

    def __init__(
        self,
        run_dir: RunDir,
        layouts: Mapping[str, ArenaLayout],
        files: Mapping[str, FileRecord],
        ring: Ring | None = None,
        paces: tuple[Pace, Pace] | None = None,
    ) -> None:
        self.run_dir, self.layouts, self.ring = run_dir, layouts, ring
        self.files = dict(files)  # the newest file of each block: may be ahead of what is committed
        self.read_bytes = self.written_bytes = 0
        self.read_s = self.write_s = 0.0
        self.direct = hasattr(os, "O_DIRECT")  # until it is refused
        self._verified, self._first_digest = set[str](), dict[str, bytes]()
        self._read_pace, self._write_pace = paces or (Pace(), Pace())
        self._readers, self._writers = (
            ThreadPoolExecutor(THREADS, f"lowmem-{job}") for job in ("reading", "writing")
        )

    def read(self, key: str, buffer: Tensor) -> None:
        """Fills `buffer` [total_bytes], or as much as fits in it of the front. Raises StoreError: file
        missing, torn, of another layout, or changed.

        A part tells nothing of the digest: whoever commits what comes of it has read the whole too.
        """
        record, header = self.files[key], self.layouts[key].header()
        path = self.run_dir.path / record.name
        verify = record.name not in self._verified and buffer.numel() == self.layouts[key].total_bytes
        head = aligned_buffer(len(header))
        began = time.perf_counter()
        with _one_line(path):
            with _open(path, os.O_RDONLY) as file:
                found = os.fstat(file.fileno()).st_size
            if found != record.num_bytes:
                raise StoreError(
                    f"{path}: expected {record.num_bytes} bytes, found {found} bytes; restore it from a copy; nothing was overwritten"
                )
            self._request(path, 0, head, reading=True)
            digests = self._move(path, len(header), buffer, reading=True, digested=verify)
        self.read_s += time.perf_counter() - began
        self.read_bytes += len(header) + buffer.numel()
        if bytes(head.numpy()) != header:
            raise StoreError(
                f"{path}: its header is not that of this run's block; restore it from a copy; nothing was overwritten"
            )
        if verify and _whole_digest(digests) != record.digest:
            raise StoreError(
                f"{path}: its data differ from what was committed; restore it from a copy; nothing was overwritten"
            )
        if verify:
            self._verified.add(record.name)

    def write(self, key: str, buffer: Tensor, visits_done: int, durable: bool = True) -> FileRecord:
        """A new file with the bytes of `buffer`, on the disk when this returns; the file there is, where no
        byte has changed.

        It counts only once a commit names it. Kernels that write the buffer must have finished. Raises
        StoreError if it cannot be written. Not `durable`: a working copy that a later write of the visit
        replaces, so neither fsync nor digest; no commit may name it.
        """
        if durable and self._unchanged(key, buffer):
            return self.files[key]
        name, header = self.run_dir.file_name(key, visits_done), self.layouts[key].header()
        path = self.run_dir.path / name
        began = time.perf_counter()
        with _one_line(path), _whole_or_gone(path):
            _open(path, os.O_WRONLY | os.O_CREAT).close()
            head = aligned_buffer(len(header))
            head.numpy()[:] = memoryview(header)
            self._request(path, 0, head, reading=False)
            digests = self._move(path, len(header), buffer, reading=False, digested=durable)
            if durable:
                with _open(path, os.O_WRONLY) as file:
                    os.fsync(file.fileno())
        self.write_s += time.perf_counter() - began
        record = FileRecord(
            name=name,
            num_bytes=len(header) + buffer.numel(),
            digest=_whole_digest(digests) if durable else NO_DIGEST,
        )
        self.written_bytes += record.num_bytes
        self._verified.add(name)
        if durable:
            self._first_digest[key] = digests[0]
        else:
            self._first_digest.pop(key, None)
        self.files[key] = record
        return record

    def keep(self, key: str, buffer: Tensor) -> Tensor:
        """What `write` may be given in place of `buffer`, so that this one is free at once: here itself."""
        return buffer

    def copy_out(self, buffer: Tensor, host: Tensor) -> None:
        """`host` takes the bytes of `buffer`, through the ring where that is a device's.

        Kernels that write it must have finished.
        """

        def copy_chunk(start: int) -> None:
            with self._host(buffer[start : start + CHUNK_BYTES], reading=False) as chunk:
                host.numpy()[start : start + CHUNK_BYTES] = chunk.numpy()

        _in_chunks(self._writers, buffer.numel(), copy_chunk)

    def copy_in(self, host: Tensor, buffer: Tensor) -> None:
        """The other way round."""

        def copy_chunk(start: int) -> None:
            with self._host(buffer[start : start + CHUNK_BYTES], reading=True) as chunk:
                chunk.numpy()[:] = host.numpy()[start : start + CHUNK_BYTES]

        _in_chunks(self._readers, buffer.numel(), copy_chunk)

    def close(self) -> None:
        self._readers.shutdown(wait=True)
        self._writers.shutdown(wait=True)
        if self.ring is not None:
            self.ring.close()

    def _unchanged(self, key: str, buffer: Tensor) -> bool:
        """Whether the newest file holds these bytes.

        Looks at the first chunk alone where that has changed, as after any training.
        """
        first = self._first_digest.get(key)

        def digest_chunk(start: int) -> bytes:
            with self._host(buffer[start : start + CHUNK_BYTES], reading=False) as chunk:
                return _digest(chunk)

        if first is None or digest_chunk(0) != first:
            return False
        return (
            _whole_digest(_in_chunks(self._writers, buffer.numel(), digest_chunk)) == self.files[key].digest
        )

    def _move(self, path: Path, position: int, buffer: Tensor, reading: bool, digested: bool) -> list[bytes]:
        """A data section that begins at `position`, into `buffer` or out of it; the digests of its chunks,
        empty where none are wanted.
        """
        pool, pace = (self._readers, self._read_pace) if reading else (self._writers, self._write_pace)

        def move_chunk(start: int) -> bytes:
            with self._host(buffer[start : start + CHUNK_BYTES], reading) as chunk, pace(chunk.numel()):
                self._request(path, position + start, chunk, reading)
                return _digest(chunk) if digested else b""

        return _in_chunks(pool, buffer.numel(), move_chunk)

    def _host(self, part: Tensor, reading: bool) -> AbstractContextManager[Tensor]:
        """`part` in host memory: itself, or a chunk of the ring that is copied to it (reading) or from it."""
        if self.ring is None or part.device.type != self.ring.device.type:
            return nullcontext(part)
        return self.ring.to_device(part) if reading else self.ring.from_device(part)

    def _request(self, path: Path, position: int, chunk: Tensor, reading: bool) -> None:
        """One read or write with a handle of its own: threads share no position, and a refusal concerns one
        request alone.
        """
        data = memoryview(chunk.numpy())  # type: ignore[arg-type]
        flags = os.O_RDONLY if reading else os.O_WRONLY
        try:
            with _open(path, flags | (os.O_DIRECT if self.direct else 0)) as file:
                file.seek(position)
                moved = file.readinto(data) if reading else file.write(data)
        except OSError as problem:
            if self.direct and problem.errno in REFUSED_DIRECT:
                self.direct = False
                return self._request(path, position, chunk, reading)
            raise
        if moved != len(data):
            raise StoreError(
                f"{path}: moved {moved} of {len(data)} bytes in one request; the disk is full or failing; free space, then run again"
            )


class HostStore(DiskStore):
    """The same, with every block also in RAM, so that reads cost a copy.

    Files are written all the same: they are the checkpoint.
    """

    @functools.cached_property
    def _copies(self) -> dict[str, Tensor]:
        return {}

    def read(self, key: str, buffer: Tensor) -> None:
        if key not in self._copies:
            whole = aligned_buffer(self.layouts[key].total_bytes)
            super().read(key, whole)
            self._copies[key] = whole
        self.copy_in(self._copies[key][: buffer.numel()], buffer)

    def write(self, key: str, buffer: Tensor, visits_done: int, durable: bool = True) -> FileRecord:
        kept = self.keep(key, buffer)
        return super().write(key, kept, visits_done) if durable else self.files[key]

    def close(self) -> None:
        super().close()
        self._copies.clear()

    def keep(self, key: str, buffer: Tensor) -> Tensor:
        if key not in self._copies:
            self._copies[key] = aligned_buffer(buffer.numel())
        kept = self._copies[key]
        if buffer is not kept:
            self.copy_out(buffer, kept)
        return kept


def _in_chunks(pool: ThreadPoolExecutor, num_bytes: int, work: Callable[[int], T]) -> list[T]:
    """`work(start)` of every chunk, on the pool's threads; results in order.

    An error is raised when no thread is at work any more.
    """
    futures = [pool.submit(work, start) for start in range(0, num_bytes, CHUNK_BYTES)]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


def _digest(chunk: Tensor) -> bytes:
    return xxhash.xxh3_128_digest(memoryview(chunk.numpy()))  # type: ignore[arg-type]


def _whole_digest(digests: list[bytes]) -> str:
    """sha256 over the XXH3 checksums (128 bits) of a data section's chunks: it tells torn and changed bytes
    at a tenth of sha256's own cost.
    """
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _open(path: Path, flags: int) -> io.FileIO:
    def opener(name: str, _: int) -> int:
        return os.open(name, flags | getattr(os, "O_BINARY", 0), 0o644)

    return io.FileIO(str(path), "wb" if flags & os.O_WRONLY else "rb", opener=opener)


@contextlib.contextmanager
def _whole_or_gone(path: Path) -> Iterator[None]:
    """A file that cannot be written to its end is removed: the disk may be full."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """What the system says of a file, as a StoreError."""
    try:
        yield
    except OSError as problem:
        raise StoreError(
            f"{path}: {problem.strerror}; the last commit is kept: mend this, then run the same command again"
        ) from None
