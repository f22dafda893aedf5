"""Carries bytes between host and device through a small ring of page-locked chunks.

A chunk belongs to one thread at a time: the thread fills it, copies it, waits for the copy's event, and gives
it back. So a ring takes threads x chunk of memory, whatever a block weighs, and no chunk is overwritten while
a copy still reads it. Chunks have their exact size (torch's own pinned allocator rounds up to a power of two)
and are locked once, before the first block.
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
from lowmem.blocks.traffic import Traffic, TransferTimes
from lowmem.units import MIB

CHUNK_BYTES = 16 * MIB  # one request to the disk, one copy, and one part of a file's digest
# For each way. Of 1, 2 and 4, two were fastest: one computes digests while the other waits for the disk.
THREADS = 2
RING_CHUNKS = 2 * THREADS
SMALLEST_RING = 2  # chunks: one each way
# The part of what a probe could lock that a ring takes, where the probe got less than it asked for: other
# programs lock pages too.
PROBE_SHARE = 0.8
PROBE_TIMEOUT_S = 120
LOCK_PROBE = ("-m", "lowmem.blocks.lock_probe")
IN, OUT = 0, 1  # host to device, device to host


class SlotPool:
    """At most `size` buffers. Each is made when it is first taken; `take` waits until one is free.

    The buffer that has been free for longest is taken next, so all of them are soon made and the memory in
    use is what the plan counts.
    """

    def __init__(self, size: int, make: Callable[[], Tensor]) -> None:
        self._free: queue.Queue[Tensor | None] = queue.Queue()  # None: not made yet
        self._make = make
        for _ in range(size):
            self._free.put(None)

    def fill(self) -> None:
        """Makes all buffers now."""
        for slot in [self.take() for _ in range(self._free.qsize())]:
            self.give(slot)

    def take(self) -> Tensor:
        slot = self._free.get()
        return self._make() if slot is None else slot

    def give(self, slot: Tensor) -> None:
        self._free.put(slot)

    def clear(self) -> None:
        """Drops every free buffer. The pool must not be used afterwards."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._free.get_nowait()


class Pace:
    """A slower disk or link: `with pace(num_bytes)` takes at least num_bytes / rate seconds.

    All threads share one rate. Without a rate nothing waits.
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
    """Chunks of host memory between host and device; counts what passes them."""

    def __init__(
        self,
        device: torch.device,
        max_chunk_bytes: int,
        lockable_bytes: int = 0,
        lock: Callable[[Tensor], bool] | None = None,
        unlock: Callable[[Tensor], None] | None = None,
        paces: tuple[Pace, Pace] | None = None,
    ) -> None:
        """`lock` page-locks a chunk, or returns False if it may not; `unlock` undoes that.

        `paces`: the least time of copies to the device and from it.
        """
        self.device, self.chunk_bytes = device, min(CHUNK_BYTES, max_chunk_bytes)
        self._passed_bytes, self._copy_s = [0, 0], [0.0, 0.0]  # IN, OUT
        self._paces, self._counting = paces or (Pace(), Pace()), threading.Lock()
        on_cuda = device.type == "cuda"
        self._streams: Any = [torch.cuda.Stream(device) for _ in (IN, OUT)] if on_cuda else None  # type: ignore[no-untyped-call]
        self._locked, self._unlock = list[Tensor](), unlock
        for _ in range(min(RING_CHUNKS, lockable_bytes // self.chunk_bytes)):
            chunk = aligned_buffer(self.chunk_bytes)
            if lock is None or not lock(chunk):
                break
            self._locked.append(chunk)
        # A smaller ring of locked chunks is faster than a full one with pageable chunks among them; one chunk
        # for both ways is not enough.
        pageable = 0 if len(self._locked) >= SMALLEST_RING else RING_CHUNKS - len(self._locked)
        chunks = self._locked + [aligned_buffer(self.chunk_bytes) for _ in range(pageable)]
        self.num_chunks = len(chunks)
        self._chunks = SlotPool(len(chunks), iter(chunks).__next__)

    def facts(self) -> dict[str, Any]:
        """What the ring could get, for the run's record."""
        return {
            "chunk_bytes": self.chunk_bytes,
            "chunks": self.num_chunks,
            "locked_bytes": len(self._locked) * self.chunk_bytes,
        }

    def traffic(self) -> Traffic:
        """Bytes that passed so far, each way."""
        passed = self._passed_bytes
        return Traffic(host_to_device_bytes=passed[IN], device_to_host_bytes=passed[OUT])

    def transfer_s(self) -> TransferTimes:
        """Seconds that the copies took, each way."""
        return TransferTimes(host_to_device_s=self._copy_s[IN], device_to_host_s=self._copy_s[OUT])

    def close(self) -> None:
        """Unlocks the chunks; copies must have finished.

        Comes before their memory is freed: CUDA never again locks memory that was freed while it was locked.
        """
        while self._locked:
            chunk = self._locked.pop()
            if self._unlock is not None:
                self._unlock(chunk)

    @contextlib.contextmanager
    def to_device(self, part: Tensor) -> Iterator[Tensor]:
        """Gives a chunk to fill; on leaving, its bytes are copied to `part`, a tensor on the device."""
        with self._chunk(part) as chunk:
            yield chunk
            self._copy(part, chunk, IN)

    @contextlib.contextmanager
    def from_device(self, part: Tensor) -> Iterator[Tensor]:
        """Gives a chunk that holds the bytes of `part`, a tensor on the device.

        Kernels that write `part` must have finished.
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
        """Copies on that way's own CUDA stream; only the calling thread waits for it."""
        with self._paces[way](source.numel()):
            if self._streams is None:
                began = time.perf_counter()
                target.copy_(source)
                copy_s = time.perf_counter() - began
            else:
                # `blocking`: the thread sleeps until the event and leaves its core to compute.
                start, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))  # type: ignore[no-untyped-call]
                with torch.cuda.stream(self._streams[way]):
                    start.record()
                    target.copy_(source, non_blocking=True)
                    end.record()
                end.synchronize()
                copy_s = start.elapsed_time(end) / 1000
        with self._counting:
            self._passed_bytes[way] += source.numel()
            self._copy_s[way] += max(copy_s, self._paces[way].least_s(source.numel()))


def ring_bytes(max_chunk_bytes: int) -> int:
    """Host memory that a ring takes for blocks of at most that size. The plan counts with this too."""
    return RING_CHUNKS * min(CHUNK_BYTES, max_chunk_bytes)


# ------------------------------------------------------------------------------------------------------------
# Page-locking


def lock_pages(buffer: Tensor) -> bool:
    """Page-locks host memory in place, until `unlock_pages`. Returns False if CUDA refuses."""
    if int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)) == 0:  # type: ignore[no-untyped-call]
        return True
    # CUDA keeps the refusal and reports it at the next call, whatever that is: let this one meet it.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    return False


def unlock_pages(buffer: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())  # type: ignore[no-untyped-call]


@functools.cache
def probe_lockable_bytes(wanted_bytes: int, chunk_bytes: int, probe: tuple[str, ...] = LOCK_PROBE) -> int:
    """Bytes of `wanted_bytes` that may be page-locked in chunks, as `lock_probe` finds in a child process."""
    try:
        done = subprocess.run(
            [sys.executable, *probe, str(wanted_bytes), str(chunk_bytes)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PROBE_TIMEOUT_S,
        )
        locked_bytes = int((done.stdout.split() or [b"0"])[-1])
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0
    return wanted_bytes if locked_bytes == wanted_bytes else int(PROBE_SHARE * locked_bytes)
