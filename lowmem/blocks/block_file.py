"""Reads and writes the chunks of a block's file on several threads.

A chunk is one request to the system, one copy over the link and one part of the file's digest. Requests pass
the page cache by (O_DIRECT): a model that streams from disk would otherwise push everything else out of
memory. Where the file system refuses that, the same requests go through the cache. Each thread computes the
digests of the chunks that it moves, while another one waits for the disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TypeVar

import xxhash
from torch import Tensor

from lowmem.blocks import staging
from lowmem.errors import StoreError
from lowmem.files import open_regular

# A file system without O_DIRECT says so at open, or only at the first request.
REFUSED_DIRECT = (errno.EINVAL, errno.ENOTSUP)
T = TypeVar("T")
U = TypeVar("U")


class ChunkRequests:
    """Single reads and writes; `direct` tells whether they still pass the page cache by."""

    def __init__(self) -> None:
        self.direct = hasattr(os, "O_DIRECT")  # until the file system refuses it

    def read(self, path: Path, position: int, chunk: Tensor) -> None:
        """Fills `chunk` [n] from `position` on. Raises OSError, or StoreError if fewer bytes came."""
        self._request(path, position, chunk, reading=True)

    def write(self, path: Path, position: int, chunk: Tensor) -> None:
        """Writes `chunk` [n] at `position`. Raises OSError, or StoreError if fewer bytes went."""
        self._request(path, position, chunk, reading=False)

    def _request(self, path: Path, position: int, chunk: Tensor, reading: bool) -> None:
        data = memoryview(chunk.numpy())  # type: ignore[arg-type]
        flags = os.O_RDONLY if reading else os.O_WRONLY
        try:
            # A handle for each request: threads must not share a position, and a refusal of O_DIRECT
            # then concerns this request alone.
            with open_file(path, flags | (os.O_DIRECT if self.direct else 0)) as file:
                file.seek(position)
                moved = file.readinto(data) if reading else file.write(data)
        except OSError as problem:
            if self.direct and problem.errno in REFUSED_DIRECT:
                self.direct = False
                return self._request(path, position, chunk, reading)
            raise
        # The system may move less than it was asked for, without an error: at a full disk, or at a
        # file's end. Nothing may then look as if it had been moved.
        if moved != len(data):
            raise StoreError(
                f"{path}: moved {moved} of {len(data)} bytes in one request; "
                "the disk is full or failing; free space, then run again"
            )


def in_chunks(pool: ThreadPoolExecutor, num_bytes: int, work: Callable[[slice], T]) -> list[T]:
    """Calls `work` with the place of each chunk, and returns the results in order.

    The pool's threads do that, and this one, which would only wait: a hand-over takes time. An error is
    raised only when no thread is at work any more: the caller may then free the buffer.
    """
    return _all_done(pool, [partial(work, chunk) for chunk in _chunks(num_bytes)])


def all_in_chunks(
    pool: ThreadPoolExecutor, parts: Sequence[tuple[U, Tensor]], work: Callable[[U, Tensor, slice], None]
) -> None:
    """`in_chunks` over several buffers at once: calls `work` with a part's two values and a chunk's place."""
    _all_done(
        pool,
        [partial(work, what, buffer, chunk) for what, buffer in parts for chunk in _chunks(buffer.numel())],
    )


def _chunks(num_bytes: int) -> Iterator[slice]:
    size = staging.CHUNK_BYTES
    return (slice(start, start + size) for start in range(0, num_bytes, size))


def _all_done(pool: ThreadPoolExecutor, calls: list[Callable[[], T]]) -> list[T]:
    futures: list[Future[T]] = [pool.submit(call) for call in calls[:-1]]
    try:
        last = [call() for call in calls[-1:]]
        return [*(future.result() for future in futures), *last]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


def chunk_digest(chunk: Tensor) -> bytes:
    """XXH3 of one chunk, 128 bits."""
    return xxhash.xxh3_128_digest(memoryview(chunk.numpy()))  # type: ignore[arg-type]


def whole_digest(chunk_digests: list[bytes]) -> str:
    """The digest of a data section: sha256 over its chunks' digests, in order.

    It finds torn and changed bytes at a tenth of what sha256 over the data themselves would cost.
    """
    return hashlib.sha256(b"".join(chunk_digests)).hexdigest()


def open_file(path: Path, flags: int) -> io.FileIO:
    """An unbuffered regular file, opened with these flags of `os.open`. Links are not followed."""

    def opener(name: str, _: int) -> int:
        return open_regular(name, flags)

    return io.FileIO(str(path), "wb" if flags & os.O_WRONLY else "rb", opener=opener)


@contextlib.contextmanager
def removed_if_it_fails(path: Path) -> Iterator[None]:
    """Removes a file that cannot be written to its end: the disk may be full."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong before says more
            path.unlink(missing_ok=True)
        raise
