"""Moves a model through the device one unit at a time, within each step of exact back-propagation.

    weights    of one unit are on the device, and those of the next are fetched meanwhile
    moments    come in chunks of rows when a unit is updated, and go back at once
    gradients  of one unit (or of a block, where a norm over the block clips them) wait for that update

So memory follows from the largest unit, whatever a block weighs. An update does not hold up compute: it goes
on a little whenever compute calls `advance`, as far as its chunks have come, while the next unit computes.
Units that the plan has room for stay on the device whole. They move only when they are committed.

Compute calls this from one thread. A thread fetches weights, one fetches chunks, and one writes them back.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem.blocks import optim
from lowmem.blocks.arena import device_buffer
from lowmem.blocks.run_dir import FileRecord
from lowmem.blocks.staging import SlotPool
from lowmem.blocks.store import Store
from lowmem.blocks.unit import Pages, Piece, Unit
from lowmem.machine.device import Device, Mark

CHUNKS = 4  # on their way at once: being read, updated, or written back
GRADIENTS = 2  # vectors of gradients: one that is made, one that is used
Given = Callable[[slice], Tensor]  # rows of a block's flat vectors -> their gradients


def spread(num_units: int, count: int) -> frozenset[int]:
    """Which units stay on the device: the first, whose update nothing hides, and others evenly."""
    count = min(count, num_units)
    return frozenset(index * num_units // count for index in range(count))


def chunk_bytes(units: Sequence[Unit]) -> int:
    """Of the largest chunk of rows that an update moves."""
    kinds = {unit.shape: unit for unit in units}
    return max((piece.num_bytes for unit in kinds.values() for _, piece in unit.chunks()), default=0)


def num_weights_slots(prefetch: bool, num_units: int) -> int:
    """Buffers for the weights of units that come and go."""
    return min(2 if prefetch else 1, num_units)


class UnitBytes(NamedTuple):
    """Bytes on the device of a stream of units, without gradients."""

    weights: int
    state: int
    fetched: int  # weights that come beside those in compute
    chunks: int  # of rows, for updates


def unit_bytes(
    units: Sequence[Unit], stay: frozenset[int], prefetch: bool, updates: bool = True
) -> UnitBytes:
    """`updates`: see `UnitStream`."""
    kept = [unit for index, unit in enumerate(units) if index in stay]
    moving = [unit for index, unit in enumerate(units) if index not in stay]
    slot = max((unit.weights_bytes for unit in moving), default=0)
    slots = num_weights_slots(prefetch, len(moving))
    return UnitBytes(
        weights=sum(unit.weights_bytes for unit in kept) + slot,
        state=sum(unit.num_bytes - unit.weights_bytes for unit in kept),
        fetched=max(slots - 1, 0) * slot,
        chunks=CHUNKS * chunk_bytes(moving) if moving and updates else 0,
    )


def gathers_by_block(grad_clip: float | None) -> bool:
    """Whether the gradients of a block gather before any of them is used: their norm clips them."""
    return grad_clip is not None


class Update(NamedTuple):
    """The update of one unit that waits for its turn."""

    unit: int
    grads: Given
    step: optim.Step
    visits_done: int
    durable: bool
    norm: Tensor  # a scalar that gathers the norm of the updated weights, where they are durable
    done: Callable[[], None]  # the gradients are used


class UnitStream:
    """`load` a unit's weights, compute with them, `release` them; `update` the unit from its gradients."""

    def __init__(
        self,
        store: Store,
        units: Sequence[Unit],
        device: Device,
        stay: frozenset[int],
        prefetch: bool,
        updates: bool = True,
        ready: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`stay`: the units that are on the device all the time. `updates`: they will be updated. `ready`:
        waits until a block can be read, by its key.
        """
        self._ready = ready
        self.store, self.units, self.device, self.stay = store, units, device, stay
        self.exposed_s = 0.0  # seconds that compute waited for weights or for chunks
        self._prefetch_on = prefetch
        self._pools = list[SlotPool]()
        moving = [unit for index, unit in enumerate(units) if index not in stay]
        if moving:
            slot_bytes = max(unit.weights_bytes for unit in moving)
            slots, size = num_weights_slots(prefetch, len(moving)), chunk_bytes(moving)
            self._slots = SlotPool(slots, lambda: device_buffer(device, slot_bytes), device)
            self._chunks = SlotPool(CHUNKS, lambda: device_buffer(device, size), device)
            self._pools = [self._slots, self._chunks]
            if device.copies:
                # Made here and not on a thread: there the allocator could hand out memory that a kernel on
                # the default stream still uses.
                self._slots.fill()
                if updates:
                    self._chunks.fill()
                device.wait_for_compute()
        self._kept: dict[int, list[Tensor]] = {}  # a buffer for each piece of a unit that stays
        self._last = {unit.key: index for index, unit in reversed(list(enumerate(units)))}
        self._rewritten: set[int] = set()  # units whose newest rows are in a file that is being written
        # Updates under way, in their order. Each yields what it waits for.
        self._waiting: deque[Iterator[Future[Any]]] = deque()
        self._failed: BaseException | None = None  # what an update has met: every later call meets it too
        self._updated: dict[int, Future[Any]] = {}  # of each unit, its last update
        self._reads: dict[int, Future[Tensor]] = {}
        self._written: dict[str, Future[FileRecord]] = {}  # durable files that no commit has named yet
        self._reader = ThreadPoolExecutor(1, "lowmem-weights")
        self._chunk_reader = ThreadPoolExecutor(1, "lowmem-chunks")
        self._writer = ThreadPoolExecutor(1, "lowmem-rows")

    # --------------------------------------------------------------------------------------------------------
    # Weights

    def load(self, unit: int) -> list[Tensor]:
        """Returns the newest weights of the unit's pieces, on the device.

        Raises the StoreError that a read or write of them has met.
        """
        with self._exposed():
            self._finish_update(unit)
            if unit in self.stay:
                return [piece.in_buffer(kept).weights for piece, kept in self._whole(unit)]
            if unit not in self._reads:
                self._reads[unit] = self._start_read(unit)
            return self.units[unit].weights(self._reads[unit].result())

    def prefetch(self, unit: int) -> None:
        """Starts to fetch a unit's weights for the `load` that will come."""
        updated = self._updated.get(unit)
        there = unit in self.stay or unit in self._reads
        if self._prefetch_on and not there and (updated is None or updated.done()):
            self._reads[unit] = self._start_read(unit)

    def release(self, unit: int) -> None:
        """Gives back weights that `load` has returned."""
        if unit not in self.stay:
            self._slots.give(self._reads.pop(unit).result(), self.device.mark())

    def _start_read(self, unit: int) -> Future[Tensor]:
        return self._reader.submit(self._read, unit, unit in self._rewritten)

    def _read(self, unit: int, rewritten: bool) -> Tensor:
        self._ready(self.units[unit].key)
        slot = self._slots.take()
        try:
            parts = list(self.units[unit].weights_pages(slot))
            self.store.read_pages(self.units[unit].key, parts, rewritten)
        except BaseException:
            self._slots.give(slot)
            raise
        return slot

    def _whole(self, unit: int) -> list[tuple[Piece, Tensor]]:
        """The pieces of a unit that stays, each with its buffer; read when they are first asked for."""
        pieces = self.units[unit].pieces
        if unit not in self._kept:
            kept = [device_buffer(self.device, piece.num_bytes) for piece in pieces]
            self.device.wait_for_compute()  # it may still use what the allocator now gives out as free
            for piece, buffer in zip(pieces, kept, strict=True):
                self.store.read_pages(self.units[unit].key, _pages(piece, buffer), False)
            self._kept[unit] = kept
        return list(zip(pieces, self._kept[unit], strict=True))

    # --------------------------------------------------------------------------------------------------------
    # Updates

    def update(self, update: Update) -> None:
        """Begins the update of a unit. `advance` and `load` go on with it."""
        self._updated[update.unit] = Future()
        work = self._staying if update.unit in self.stay else self._moving
        self._waiting.append(work(update))
        self.advance()

    def advance(self) -> None:
        """Goes on with the updates as far as their chunks have come. Raises StoreError."""
        self._advance()

    def _advance(self) -> Future[Any] | None:
        """Returns what the first update waits for."""
        if self._failed is not None:
            raise self._failed
        while self._waiting:
            try:
                awaited = next(self._waiting[0], None)
            except BaseException as problem:
                self._failed = problem
                raise
            if awaited is not None:
                return awaited
            self._waiting.popleft()
        return None

    def finish(self) -> None:
        """Waits until no update is under way. Raises StoreError."""
        while self._waiting:
            self.finish_first()

    def finish_first(self) -> None:
        """Waits for the update that has been under way for longest. Raises StoreError."""
        with self._exposed():
            first = self._waiting[0]
            while self._waiting and self._waiting[0] is first:
                self._go_on()

    def _finish_update(self, unit: int) -> None:
        """Waits until the unit's newest rows can be read."""
        if unit not in self._updated:
            return
        while self._waiting and not self._updated[unit].done():
            self._go_on()
        self._updated[unit].result()

    def _go_on(self) -> None:
        awaited = self._advance()
        if awaited is not None:
            wait([awaited])

    def _staying(self, update: Update) -> Iterator[Future[Any]]:
        unit = self.units[update.unit]
        for piece, buffer in self._whole(update.unit):
            rows = piece.in_buffer(buffer)
            self._change(rows, update)
            if update.durable:
                self.store.begin(unit.key, update.visits_done)
                parts = _pages(piece, buffer)
                write = self._writer.submit(self._write, unit.key, parts, self.device.mark())
                while not write.done():
                    yield write
                write.result()
        update.done()
        self._end(update)

    def _moving(self, update: Update) -> Iterator[Future[Any]]:
        unit, rewritten = self.units[update.unit], update.unit in self._rewritten
        pieces = [piece for _, piece in unit.chunks()]
        reads: deque[tuple[Piece, Future[Tensor]]] = deque()
        writes: list[Future[None]] = []
        self.store.begin(unit.key, update.visits_done)
        for index in range(len(pieces) + CHUNKS - 1):
            if index < len(pieces):
                piece = pieces[index]
                read = self._chunk_reader.submit(self._read_chunk, unit.key, piece, rewritten)
                reads.append((piece, read))
            if index < CHUNKS - 1:
                continue
            piece, read = reads.popleft()
            while not read.done():
                yield read
            buffer = read.result()
            self._change(piece.in_buffer(buffer), update)
            writes.append(self._writer.submit(self._write_chunk, unit.key, piece, buffer, self.device.mark()))
        update.done()
        for write in writes:
            while not write.done():
                yield write
            write.result()
        self._rewritten.add(update.unit)
        self._end(update)

    def _change(self, rows: optim.Rows, update: Update) -> None:
        grads = update.grads(slice(rows.first, rows.first + len(rows.weights)))
        optim.update_slices(rows, grads, update.step)
        if update.durable:
            # Into one tensor: small ones that stay, between the temporaries of the slices, would keep those
            # apart once they are freed, and the C library's heap would grow with every chunk.
            torch.hypot(update.norm, optim.gradient_norm(rows.weights), out=update.norm)

    def _end(self, update: Update) -> None:
        """The unit is updated. Where that is durable, the last unit of a block ends the block's file, and its
        units can be read again when the file is whole.
        """
        key = self.units[update.unit].key
        if not update.durable:
            self._updated[update.unit].set_result(None)
            return
        self._rewritten.discard(update.unit)
        if self._last[key] == update.unit:
            self._written[key] = self._writer.submit(self.store.end, key, update.visits_done)
            block = [index for index, unit in enumerate(self.units) if unit.key == key]
            self._updated.update(dict.fromkeys(block, self._written[key]))

    def _read_chunk(self, key: str, piece: Piece, rewritten: bool) -> Tensor:
        buffer = self._chunks.take()
        try:
            self.store.read_pages(key, _pages(piece, buffer), rewritten)
        except BaseException:
            self._chunks.give(buffer)
            raise
        return buffer

    def _write_chunk(self, key: str, piece: Piece, buffer: Tensor, mark: Mark) -> None:
        try:
            self._write(key, _pages(piece, buffer), mark)
        finally:
            self._chunks.give(buffer)

    def _write(self, key: str, parts: list[tuple[Pages, Tensor]], mark: Mark) -> None:
        """`mark`: compute has changed the rows by then."""
        self.device.wait(mark)
        self.store.write_pages(key, parts)

    def take_written(self) -> dict[str, Future[FileRecord]]:
        """The files of a durable step, by key, for the commit that names them."""
        written, self._written = self._written, {}
        return written

    # --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends the threads and frees the memory. Updates that are under way stop where they are.

        What is being written is written to its end: a commit may be waiting for it.
        """
        for thread in (self._reader, self._chunk_reader):
            thread.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True)
        self._failed = None
        for held in (self._waiting, self._kept, self._reads, self._updated, self._written):
            held.clear()
        for pool in self._pools:
            pool.clear()

    @contextlib.contextmanager
    def _exposed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.exposed_s += time.perf_counter() - start


def _pages(piece: Piece, buffer: Tensor) -> list[tuple[Pages, Tensor]]:
    return [(field.pages, part) for field, part in piece.parts(buffer)]
