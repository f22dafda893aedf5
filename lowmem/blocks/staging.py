"""Host memory on the way to a device and back: a small ring of page-locked chunks through which blocks of any
size pass.

A chunk belongs to one thread at a time: it is filled, copied, its copy's event is awaited, and it goes back.
So a ring never needs more memory than threads x chunk, whatever a block weighs, and a chunk is never
overwritten while a copy reads it. Chunks are of exact size (torch's own pinned allocator rounds up to a power
of two) and locked once, before the first block.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lowmem.blocks.arena import aligned_buffer
from lowmem.units import MIB

CHUNK_BYTES = 16 * MIB  # of one request to the disk, one copy, and one part of a file's digest
THREADS = (
    2  # for each way; measured for 1, 2 and 4: one thread computes digests while the other waits for the disk
)
RING_CHUNKS = 2 * THREADS
SMALLEST_RING = 2  # chunks: one each way
PROBE_SHARE = (
    0.8  # of what a probe could lock where that was less than asked: the rest of the machine locks pages too
)
PROBE_TIMEOUT_S = 120
IN, OUT = 0, 1  # host to device, device to host


class SlotPool:
    """At most `size` buffers, made when first needed; `take` waits for a free one.

    In turn, so that all are soon made, as the plan counts.
    """

    def __init__(self, size: int, make: Callable[[], Tensor]) -> None:
        self._free: queue.Queue[Tensor | None] = queue.Queue()
        self._make = make
        for _ in range(size):
            self._free.put(None)

    def fill(self) -> None:
        for slot in [self.take() for _ in range(self._free.qsize())]:
            self.give(slot)

    def take(self) -> Tensor:
        slot = self._free.get()
        return self._make() if slot is None else slot

    def give(self, slot: Tensor) -> None:
        self._free.put(slot)

    def clear(self) -> None:
        """Lets go of every free slot: for the end."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._free.get_nowait()


class Pace:
    """`with pace(num_bytes)` takes at least num_bytes / rate seconds, one after the other over all threads.

    No rate: as long as it takes.
    """

    def __init__(self, bytes_per_s: float | None = None) -> None:
        self._rate, self._free_at, self._lock = bytes_per_s, 0.0, threading.Lock()

    def least_s(self, num_bytes: int) -> float:
        return 0.0 if self._rate is None else num_bytes / self._rate

    @contextlib.contextmanager
    def __call__(self, num_bytes: int) -> Iterator[None]:
        with self._lock:
            due = self._free_at = max(self._free_at, time.perf_counter()) + self.least_s(num_bytes)
        yield
        time.sleep(max(0.0, due - time.perf_counter()))


class Ring:
    """Chunks between host and device, with what passed them.

    `lock(buffer)` page-locks a chunk or says that it may not; `close` ends that.
    """

    def __init__(
        self,
        device: torch.device,
        max_chunk_bytes: int,
        lockable_bytes: int = 0,
        lock: Callable[[Tensor], bool] | None = None,
        unlock: Callable[[Tensor], None] | None = None,
        paces: tuple[Pace, Pace] | None = None,
    ) -> None:
        self.device, self.chunk_bytes = device, min(CHUNK_BYTES, max_chunk_bytes)
        self.passed_bytes, self.copy_s = [0, 0], [0.0, 0.0]  # IN, OUT
        self._paces, self._counting = paces or (Pace(), Pace()), threading.Lock()
        on_cuda = device.type == "cuda"
        self._streams: Any = [torch.cuda.Stream(device) for _ in (IN, OUT)] if on_cuda else None  # type: ignore[no-untyped-call]
        self._locked, self._unlock = list[Tensor](), unlock
        for _ in range(min(RING_CHUNKS, lockable_bytes // self.chunk_bytes)):
            chunk = aligned_buffer(self.chunk_bytes)
            if lock is None or not lock(chunk):
                break
            self._locked.append(chunk)
        pageable = 0 if len(self._locked) >= SMALLEST_RING else RING_CHUNKS - len(self._locked)
        chunks = self._locked + [aligned_buffer(self.chunk_bytes) for _ in range(pageable)]
        self.num_chunks = len(chunks)
        self._chunks = SlotPool(len(chunks), iter(chunks).__next__)

    def facts(self) -> dict[str, Any]:
        """For a record of the run."""
        return {
            "chunk_bytes": self.chunk_bytes,
            "chunks": self.num_chunks,
            "locked_bytes": len(self._locked) * self.chunk_bytes,
        }

    def close(self) -> None:
        """Before the memory is given back: what is freed while it is locked cannot be locked again.

        Copies must have finished.
        """
        while self._locked:
            chunk = self._locked.pop()
            if self._unlock is not None:
                self._unlock(chunk)

    @contextlib.contextmanager
    def to_device(self, part: Tensor) -> Iterator[Tensor]:
        """A chunk to fill; its bytes are in `part`, on the device, on leaving."""
        with self._chunk(part) as chunk:
            yield chunk
            self._copy(part, chunk, IN)

    @contextlib.contextmanager
    def from_device(self, part: Tensor) -> Iterator[Tensor]:
        """A chunk that holds the bytes of `part`, a tensor on the device.

        Kernels that write it must have finished.
        """
        with self._chunk(part) as chunk:
            self._copy(chunk, part, OUT)
            yield chunk

    @contextlib.contextmanager
    def _chunk(self, part: Tensor) -> Iterator[Tensor]:
        chunk = self._chunks.take()
        try:
            yield chunk[: part.numel()]
        finally:
            self._chunks.give(chunk)

    def _copy(self, target: Tensor, source: Tensor, way: int) -> None:
        """A copy on the way's own stream; the calling thread alone waits for its event."""
        with self._paces[way](source.numel()):
            if self._streams is None:
                began = time.perf_counter()
                target.copy_(source)
                copy_s = time.perf_counter() - began
            else:
                start, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))  # type: ignore[no-untyped-call]
                with torch.cuda.stream(self._streams[way]):
                    start.record()
                    target.copy_(source, non_blocking=True)
                    end.record()
                end.synchronize()
                copy_s = start.elapsed_time(end) / 1000
        with self._counting:
            self.passed_bytes[way] += source.numel()
            self.copy_s[way] += max(copy_s, self._paces[way].least_s(source.numel()))


def ring_bytes(max_chunk_bytes: int) -> int:
    """What a ring takes of the host's memory, for blocks of at most that size. The plan counts the same."""
    return RING_CHUNKS * min(CHUNK_BYTES, max_chunk_bytes)


# ------------------------------------------------------------------------------------------------------------
# Page-locking


def lock_pages(buffer: Tensor) -> bool:
    """Page-locks host memory in place, until `unlock_pages`.

    False where CUDA refuses; the refusal is cleared, so that no later call meets it.
    """
    if int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)) == 0:  # type: ignore[no-untyped-call]
        return True
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    return False


def unlock_pages(buffer: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())  # type: ignore[no-untyped-call]


_PROBE = """
import sys
from lowmem.blocks.arena import aligned_buffer
from lowmem.blocks.staging import lock_pages
kept, chunk_bytes = [], int(sys.argv[2])
for _ in range(int(sys.argv[1]) // chunk_bytes):
    kept.append(aligned_buffer(chunk_bytes))
    if not lock_pages(kept[-1]):
        break
    print(len(kept) * chunk_bytes, flush=True)
"""


@functools.cache
def probe_lockable_bytes(wanted_bytes: int, chunk_bytes: int, script: str = _PROBE) -> int:
    """How much of `wanted_bytes` may be page-locked, tried in a child: a refusal can spoil the process that
    meets it.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(wanted_bytes), str(chunk_bytes)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PROBE_TIMEOUT_S,
        )
        locked_bytes = int((done.stdout.split() or [b"0"])[-1])
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0
    return wanted_bytes if locked_bytes == wanted_bytes else int(PROBE_SHARE * locked_bytes)
