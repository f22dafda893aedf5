"""Carries bytes between host and device through a small ring of page-locked chunks.

A chunk belongs to one thread at a time: the thread fills it, copies it, waits for the copy, and gives it
back. So a ring takes threads x chunk of memory, whatever a block weighs, and no chunk is overwritten while a
copy still reads it. Chunks are locked once, before the first block.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any

from torch import Tensor

from lowmem.blocks.arena import aligned_buffer
from lowmem.blocks.traffic import Traffic, TransferTimes
from lowmem.machine.device import Device, Mark, Way
from lowmem.units import MIB

CHUNK_BYTES = 16 * MIB  # one request to the disk, one copy, and one part of a file's digest
# For each way. Of 1, 2 and 4, two were fastest: one computes digests while the other waits for the disk.
THREADS = 2
RING_CHUNKS = 2 * THREADS
SMALLEST_RING = 2  # chunks: one each way
PIECE_BYTES = CHUNK_BYTES // 2  # of a copy: what it is cut into
PIECES_BEGUN = 2  # at once on a way: one is copied, and one is there when that is done
IN, OUT = 0, 1  # host to device, device to host


class SlotPool:
    """At most `size` buffers. Each is made when it is first taken; `take` waits until one is free.

    The buffer that has been free for longest is taken next, so all of them are soon made and the memory in
    use is what the plan counts.
    """

    def __init__(self, size: int, make: Callable[[], Tensor], device: Device) -> None:
        self._free: queue.Queue[tuple[Tensor, Mark] | None] = queue.Queue()  # None: not made yet
        self._stopped = False
        self._make, self._device = make, device
        for _ in range(size):
            self._free.put(None)

    def fill(self) -> None:
        """Makes all buffers now."""
        for slot in [self.take() for _ in range(self._free.qsize())]:
            self.give(slot)

    def take(self) -> Tensor:
        """Returns a buffer that nothing uses any more. The calling thread waits for that.

        Raises CancelledError once the pool is stopped.
        """
        free = self._free.get()
        if self._stopped:
            self._free.put(free)  # for the next that waits
            raise CancelledError
        if free is None:
            return self._make()
        slot, mark = free
        self._device.wait(mark)
        return slot

    def give(self, slot: Tensor, mark: Mark = None) -> None:
        """`mark`: compute uses the buffer as far as that."""
        self._free.put((slot, mark))

    def stop(self) -> None:
        """Ends every `take` that waits, now and later: the buffers may never come back."""
        self._stopped = True
        self._free.put(None)

    def clear(self) -> None:
        """Drops every free buffer. The pool must not be used afterwards."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._free.get_nowait()
        self.__dict__.pop("_make", None)  # it may hold buffers too


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
        if self._rate is None:
            yield
            return
        with self._lock:
            due = self._free_at = max(self._free_at, time.perf_counter()) + self.least_s(num_bytes)
        yield
        time.sleep(max(0.0, due - time.perf_counter()))


def pieces_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Cuts copies between flat buffers (uint8) into pieces of at most PIECE_BYTES."""
    piece, room = list[tuple[Tensor, Tensor]](), PIECE_BYTES
    for target, source in pairs:
        done = 0
        while done < len(source):
            stop = min(done + room, len(source))
            piece.append((target[done:stop], source[done:stop]))
            room, done = room - (stop - done), stop
            if not room:
                yield piece
                piece, room = [], PIECE_BYTES
    if piece:
        yield piece


class Lane:
    """A way to or from the device whose copies are cut into pieces, so that an urgent one need not wait.

    Few pieces are begun at once. So an urgent copy waits for those alone, and no longer one gets ahead of it.
    """

    def __init__(self, way: Way) -> None:
        self._way, self._turn = way, threading.Condition()
        self._begun = self._urgent = 0  # pieces; urgent copies that are under way

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], urgent: bool) -> float:
        """Returns when the bytes are there: the seconds that it took."""
        taken_s, mine = 0.0, deque[Any]()
        self._count(urgent=int(urgent))
        try:
            for piece in pieces_of(pairs):
                while not self._may_begin(urgent, wait=not mine):
                    taken_s += self._finish(mine)
                mine.append(self._begin(piece))
        finally:
            while mine:
                taken_s += self._finish(mine)
            self._count(urgent=-int(urgent))
        return taken_s

    def _may_begin(self, urgent: bool, wait: bool) -> bool:
        """Takes a turn. `wait`: until there is one, which must not be while the caller's own are not over."""

        def free() -> bool:
            return self._begun < PIECES_BEGUN and (urgent or not self._urgent)

        with self._turn:
            if wait:
                self._turn.wait_for(free)
            taken = free()
            self._begun += taken
            return taken

    def _begin(self, piece: list[tuple[Tensor, Tensor]]) -> Any:
        try:
            return self._way.begin(piece)
        except BaseException:
            self._count(begun=-1)
            raise

    def _finish(self, mine: deque[Any]) -> float:
        try:
            return self._way.finish(mine.popleft())
        finally:
            self._count(begun=-1)

    def _count(self, begun: int = 0, urgent: int = 0) -> None:
        with self._turn:
            self._begun, self._urgent = self._begun + begun, self._urgent + urgent
            self._turn.notify_all()


class Ring:
    """Chunks of host memory between host and device; counts what passes them."""

    def __init__(
        self,
        device: Device,
        max_chunk_bytes: int,
        lockable_bytes: int = 0,
        paces: tuple[Pace, Pace] | None = None,
    ) -> None:
        """`lockable_bytes`: as much as may be page-locked. `paces`: the least time of copies, each way."""
        self.device, self.chunk_bytes = device, min(CHUNK_BYTES, max_chunk_bytes)
        self._passed_bytes, self._copy_s = [0, 0], [0.0, 0.0]  # IN, OUT
        self._paces, self._counting = paces or (Pace(), Pace()), threading.Lock()
        self._lanes = Lane(device.way()), Lane(device.way())
        chunks = list[Tensor]()
        while len(chunks) < min(RING_CHUNKS, lockable_bytes // self.chunk_bytes):
            locked = device.locked(self.chunk_bytes)
            if locked is None:
                break
            chunks.append(locked)
        self._locked_bytes = len(chunks) * self.chunk_bytes
        # A smaller ring of locked chunks is faster than a full one with pageable chunks among them; one chunk
        # for both ways is not enough.
        if len(chunks) < SMALLEST_RING:
            chunks += [aligned_buffer(self.chunk_bytes) for _ in range(RING_CHUNKS - len(chunks))]
        self.num_chunks = len(chunks)
        self._chunks = SlotPool(len(chunks), iter(chunks).__next__, device)

    def facts(self) -> dict[str, Any]:
        """What the ring could get, for the run's record."""
        return {
            "chunk_bytes": self.chunk_bytes,
            "chunks": self.num_chunks,
            "locked_bytes": self._locked_bytes,
        }

    def traffic(self) -> Traffic:
        """Bytes that passed so far, each way."""
        passed = self._passed_bytes
        return Traffic(host_to_device_bytes=passed[IN], device_to_host_bytes=passed[OUT])

    def transfer_s(self) -> TransferTimes:
        """Seconds that the copies took, each way."""
        return TransferTimes(host_to_device_s=self._copy_s[IN], device_to_host_s=self._copy_s[OUT])

    def close(self) -> None:
        """Lets go of the chunks; copies must have finished."""
        self._chunks.clear()

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], way: int, urgent: bool = False) -> None:
        """Copies to each target from its source past the chunks, where the host's side is page-locked itself.

        Kernels that write the sources must have finished. `urgent`: compute waits for it soon, so it goes
        before copies that are not.
        """
        num_bytes = sum(source.numel() for _, source in pairs)
        with self._paces[way](num_bytes):
            copy_s = self._lanes[way].copy(pairs, urgent)
        with self._counting:
            self._passed_bytes[way] += num_bytes
            self._copy_s[way] += max(copy_s, self._paces[way].least_s(num_bytes))

    @contextlib.contextmanager
    def to_device(self, part: Tensor, urgent: bool = False) -> Iterator[Tensor]:
        """Gives a chunk to fill; on leaving, its bytes are copied to `part`, a tensor on the device."""
        with self._chunk(part) as chunk:
            yield chunk
            self.copy([(part, chunk)], IN, urgent)

    @contextlib.contextmanager
    def from_device(self, part: Tensor, urgent: bool = False) -> Iterator[Tensor]:
        """Gives a chunk that holds the bytes of `part`, a tensor on the device.

        Kernels that write `part` must have finished.
        """
        with self._chunk(part) as chunk:
            self.copy([(chunk, part)], OUT, urgent)
            yield chunk

    def parts(self, num_bytes: int) -> Iterator[slice]:
        """Cuts so many bytes into what a chunk holds."""
        for start in range(0, num_bytes, self.chunk_bytes):
            yield slice(start, min(start + self.chunk_bytes, num_bytes))

    @contextlib.contextmanager
    def _chunk(self, part: Tensor) -> Iterator[Tensor]:
        chunk = self._chunks.take()
        try:
            yield chunk[: part.numel()]
        finally:
            self._chunks.give(chunk)


def ring_bytes(max_chunk_bytes: int) -> int:
    """Host memory that a ring takes for blocks of at most that size. The plan counts with this too."""
    return RING_CHUNKS * min(CHUNK_BYTES, max_chunk_bytes)
