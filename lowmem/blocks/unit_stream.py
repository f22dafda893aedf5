"""Moves a model through the device one unit at a time, within each step of exact back-propagation.

    weights    of one unit are on the device, and those of the next are fetched meanwhile
    gradients  of one unit (or of a block, where a norm over the block clips them) wait for its update
    moments    come in chunks of rows when a unit is updated, and go back at once

The update changes the weights that the backward pass has left on the device, and writes them back, so they
are not fetched for it. Where a block's gradients gather first, weights come once more, in chunks with the
moments. The unit that is updated last is the first that the next step needs: its weights stay until then.

So memory follows from the largest unit, whatever a block weighs. An update does not hold up compute: it goes
on a little whenever compute calls `advance`, as far as its chunks have come, while the next unit computes.
Units that the plan has room for stay on the device whole. They move only when they are committed. Of others
the weights alone may stay: then moments move, and weights when they are committed. The shared
part may be updated like a unit that moves. Its weights are then on the device all along as well.

Compute calls this from one thread. A thread fetches weights, one fetches chunks, and one writes them back.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem.blocks import optim
from lowmem.blocks.arena import device_buffer
from lowmem.blocks.run_dir import FileRecord
from lowmem.blocks.staging import SlotPool
from lowmem.blocks.store import Store
from lowmem.blocks.unit import Pages, Piece, Unit, first_alike
from lowmem.machine.device import Device, Mark

CHUNKS = 4  # on their way at once: being read, updated, or written back
GRADIENTS = 2  # vectors of gradients: one that is made, one that is used
Parts = Callable[[], list[tuple[Pages, Tensor]]]  # says what is to be written
Given = Callable[[slice], Tensor]  # rows of a block's flat vectors -> their gradients


def spread(num_units: int, count: int) -> frozenset[int]:
    """Which units stay on the device: the first, whose update nothing hides, and others evenly."""
    count = min(count, num_units)
    return frozenset(index * num_units // count for index in range(count))


def spread_over(num_units: int, stay: frozenset[int], count: int) -> frozenset[int]:
    """`spread` over the units that do not stay: those whose weights alone do."""
    others = sorted(set(range(num_units)) - stay)
    return frozenset(others[place] for place in spread(len(others), count))


def chunk_bytes(units: Sequence[Unit], in_place: bool, shared: Unit | None = None) -> int:
    """Of the largest chunk of rows that an update moves; `in_place`: of units without their weights."""
    chunks = [unit.chunk_bytes for unit in first_alike(units).values()]
    sizes = [state if in_place else whole for whole, state in chunks]
    if shared is not None:
        whole, _ = shared.chunk_bytes
        sizes.append(whole)
    return max(sizes, default=0)


def num_weights_slots(prefetch: bool, num_units: int) -> int:
    """Buffers for the weights of units that come and go."""
    return min(2 if prefetch else 1, num_units)


class UnitBytes(NamedTuple):
    """Bytes on the device of a stream of units, without gradients."""

    weights: int
    state: int
    fetched: int  # weights that come beside those in compute
    chunks: int  # of rows, for updates


def moving_units(
    units: Sequence[Unit], stay: frozenset[int], held: frozenset[int], updates: bool
) -> tuple[list[Unit], list[Unit]]:
    """(units whose weights come and go, units whose moments do). The parameters are those of `UnitStream`."""
    weights = [unit for index, unit in enumerate(units) if index not in stay | held]
    return weights, [unit for index, unit in enumerate(units) if index not in stay and updates]


def unit_bytes(
    units: Sequence[Unit],
    stay: frozenset[int],
    prefetch: bool,
    updates: bool = True,
    in_place: bool = False,
    shared: Unit | None = None,
    held: frozenset[int] = frozenset(),
) -> UnitBytes:
    """The parameters are those of `UnitStream`."""
    kept = [unit for index, unit in enumerate(units) if index in stay]
    moving, updated = moving_units(units, stay, held, updates)
    slot = max((unit.weights_bytes for unit in moving), default=0)
    slots = num_weights_slots(prefetch, len(moving))
    return UnitBytes(
        weights=sum(units[index].weights_bytes for index in stay | held) + slot,
        state=sum(unit.num_bytes - unit.weights_bytes for unit in kept),
        fetched=max(slots - 1, 0) * slot,
        chunks=CHUNKS * chunk_bytes(updated, in_place, shared),
    )


def gathers_by_block(grad_clip: float | None) -> bool:
    """Whether the gradients of a block gather before any of them is used: their norm clips them."""
    return grad_clip is not None


def updates_in_place(units: Sequence[Unit], grad_clip: float | None) -> bool:
    """Whether a unit is updated as soon as its backward pass is over, so that its weights are still there."""
    return not gathers_by_block(grad_clip) or len({unit.key for unit in units}) == len(units)


def kept_for_next_step(num_units: int, stay: frozenset[int]) -> int | None:
    """The unit whose weights need not be fetched at the start of a step, because the last step has updated
    them in place and no other unit has needed the room since. None: every unit stays.
    """
    return min(set(range(num_units)) - stay, default=None)


class Update(NamedTuple):
    """The update of one unit that waits for its turn."""

    unit: int
    grads: Given
    step: optim.Step
    visits_done: int
    durable: bool
    norm: Tensor  # a scalar that gathers the norm of the updated weights, where they are durable
    done: Callable[[], None]  # the gradients are used
    changed: Callable[[optim.Rows], None] | None = None  # sees rows that are updated


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
        in_place: bool = False,
        shared: Unit | None = None,
        held: frozenset[int] = frozenset(),
        ready: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`stay`: the units that are on the device all the time. `held`: those whose weights alone are,
        which takes updates in place. `updates`: they will be updated. `in_place`:
        see `updates_in_place`. `shared`: the shared part, where it is updated here too. It then has the
        number after the last unit's. `ready`: waits until a block can be read, by its key.
        """
        self._ready = ready
        assert in_place or not held, "their updates would fetch weights"
        self.store, self.units, self.device, self.stay, self.held = store, units, device, stay, held
        self.shared, self._every = len(units), [*units, *([] if shared is None else [shared])]
        self.exposed_s = 0.0  # seconds that compute waited for weights or for chunks
        self._prefetch_on = prefetch
        self._pools = list[SlotPool]()
        moving, updated = moving_units(units, stay, held, updates)
        size = chunk_bytes(updated, in_place, shared)
        if moving:
            slot_bytes = max(unit.weights_bytes for unit in moving)
            slots = num_weights_slots(prefetch, len(moving))
            self._slots = SlotPool(slots, lambda: device_buffer(device, slot_bytes), device)
            self._pools.append(self._slots)
        if size:
            self._chunks = SlotPool(CHUNKS, lambda: device_buffer(device, size), device)
            self._pools.append(self._chunks)
        if device.copies:
            # Made here and not on a thread: there the allocator could hand out memory that a kernel on the
            # default stream still uses.
            for pool in self._pools:
                pool.fill()
            device.wait_for_compute()
        self._kept: dict[int, list[Tensor]] = {}  # a buffer for each piece of a unit that stays
        self._held: dict[int, Tensor] = {}  # weights that stay
        self._in_place, self._next = in_place, kept_for_next_step(len(units), stay | held)
        self._left: dict[int, Tensor] = {}  # slots with weights that the next update of the unit changes
        self._writing: Future[None] | None = None  # of the weights that wait in a slot for the next step
        self._last = {unit.key: index for index, unit in reversed(list(enumerate(self._every)))}
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
            if unit in self.stay:
                self._finish_update(unit)
                return [piece.in_buffer(kept).weights for piece, kept in self._whole(unit)]
            if unit in self.held:
                self._finish_update(unit)
                return self.units[unit].weights(self._weights_of(unit))
            if unit not in self._reads:
                self._finish_update(unit)
            if unit not in self._reads:  # the update may have kept the weights
                self._reads[unit] = self._start_read(unit)
            while not self._reads[unit].done():  # it may wait for a slot that an update still uses
                self._go_on(self._reads[unit])
            return self.units[unit].weights(self._reads[unit].result())

    def prefetch(self, unit: int) -> None:
        """Starts to fetch a unit's weights for the `load` that will come."""
        updated = self._updated.get(unit)
        there = unit in self.stay | self.held or unit in self._reads
        if self._prefetch_on and not there and (updated is None or updated.done()):
            self._reads[unit] = self._start_read(unit)

    def release(self, unit: int, update_follows: bool = False) -> None:
        """Gives back weights that `load` has returned.

        `update_follows`: the unit's next update is the next thing that happens to it.
        """
        if unit in self.stay:
            return
        if unit in self.held:
            if update_follows:
                self._left[unit] = self._held[unit]
            return
        slot, mark = self._reads.pop(unit).result(), self.device.mark()
        if update_follows and self._in_place:
            self._left[unit] = slot
        elif unit == self._next and self._writing is not None:
            self._writing.add_done_callback(_giving(self._slots, slot, mark))
        else:
            self._slots.give(slot, mark)

    def _start_read(self, unit: int) -> Future[Tensor]:
        return self._reader.submit(self._read, unit, unit in self._rewritten)

    def _read(self, unit: int, rewritten: bool) -> Tensor:
        self._ready(self.units[unit].key)
        slot = self._slots.take()
        try:
            self.store.read_pages(self.units[unit].key, self.units[unit].weights_pages(slot), rewritten)
        except BaseException:
            self._slots.give(slot)
            raise
        return slot

    def _weights_of(self, unit: int) -> Tensor:
        """The weights that stay of a unit; read when they are first asked for."""
        if unit not in self._held:
            buffer = device_buffer(self.device, self.units[unit].weights_bytes)
            self.device.wait_for_compute()  # it may still use what the allocator now gives out as free
            self.store.read_pages(self.units[unit].key, self.units[unit].weights_pages(buffer), False)
            self._held[unit] = buffer
        return self._held[unit]

    def _whole(self, unit: int) -> list[tuple[Piece, Tensor]]:
        """The pieces of a unit that stays, each with its buffer; read when they are first asked for."""
        pieces = self.units[unit].pieces
        if unit not in self._kept:
            kept = [device_buffer(self.device, piece.num_bytes()) for piece in pieces]
            self.device.wait_for_compute()  # it may still use what the allocator now gives out as free
            for piece, buffer in zip(pieces, kept, strict=True):
                self.store.read_pages(self.units[unit].key, piece.parts(buffer), False)
            self._kept[unit] = kept
        return list(zip(pieces, self._kept[unit], strict=True))

    # --------------------------------------------------------------------------------------------------------
    # Updates

    def update(self, update: Update) -> None:
        """Begins the update of a unit. `advance` and `load` go on with it."""
        if update.unit == self.shared:
            self._finish_update(update.unit)  # nothing has loaded it since the last one
        ended = self._updated[update.unit] = Future()
        work = self._staying if update.unit in self.stay else self._moving
        self._waiting.append(work(update, ended))
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

    def read_shared(self, take: Callable[[slice, Tensor], None]) -> None:
        """Hands the shared part's weights to `take`, some rows after the others. Raises StoreError."""
        unit = self._every[self.shared]
        parts = [(piece.rows, piece.field("weights")) for _, piece in unit.chunks()]
        buffer = device_buffer(self.device, max(field.pages.num_bytes for _, field in parts))
        for rows, field in parts:
            self.device.wait_for_compute()  # it may still use what lay in the buffer
            part = buffer[: field.pages.num_bytes]
            self.store.read_pages(unit.key, [(field.pages, part)], False)
            take(rows, field.pages.of(part, field.dtype))

    def finish(self) -> None:
        """Waits until no update is under way. Raises StoreError."""
        while self._waiting:
            self.wait()

    def wait(self) -> None:
        """Waits until an update has gone on. Raises StoreError."""
        with self._exposed():
            self._go_on()

    def _finish_update(self, unit: int) -> None:
        """Waits until the unit's newest rows can be read."""
        if unit not in self._updated:
            return
        while self._waiting and not self._updated[unit].done():
            self._go_on()
        self._updated[unit].result()

    def _go_on(self, *others: Future[Any]) -> None:
        """Goes on with the updates, and waits for what they need next, or for one of `others`."""
        awaited = self._advance()
        futures = [*others, *([] if awaited is None else [awaited])]
        if futures:
            wait(futures, return_when=FIRST_COMPLETED)

    def _staying(self, update: Update, ended: Future[Any]) -> Iterator[Future[Any]]:
        unit = self.units[update.unit]
        for piece, buffer in self._whole(update.unit):
            self._change(piece, buffer, None, update)
            if update.durable:
                self.store.begin(unit.key, update.visits_done)
                write = self._write_soon(unit.key, partial(piece.parts, buffer))
                while not write.done():
                    yield write
                write.result()
        update.done()
        self._end(update, ended)

    def _moving(self, update: Update, ended: Future[Any]) -> Iterator[Future[Any]]:
        unit, rewritten = self._every[update.unit], update.unit in self._rewritten
        slot = self._left.pop(update.unit, None)
        there = self._in_place and update.unit != self.shared
        assert slot is not None or not there, "`release` says that an update follows"
        weights = None if slot is None else unit.weights(slot)
        chunks, with_weights = list(unit.chunks()), slot is None
        reads: deque[tuple[int, Piece, Future[Tensor]]] = deque()
        writes: list[Future[None]] = []
        self.store.begin(unit.key, update.visits_done)
        for index in range(len(chunks) + CHUNKS - 1):
            if index < len(chunks):
                place, piece = chunks[index]
                read = self._chunk_reader.submit(self._read_chunk, unit.key, piece, with_weights, rewritten)
                reads.append((place, piece, read))
            if index < CHUNKS - 1:
                continue
            place, piece, read = reads.popleft()
            while not read.done():
                yield read
            buffer = read.result()
            in_slot = None if weights is None else unit.rows(weights, place, piece.numel)
            self._change(piece, buffer, in_slot, update)
            parts = partial(piece.parts, buffer, with_weights)
            write = self._write_soon(unit.key, parts, more=bool(reads))
            write.add_done_callback(_giving(self._chunks, buffer))
            writes.append(write)
        update.done()
        held = update.unit in self.held
        if slot is not None and (update.durable or not held):
            writes.append(self._write_soon(unit.key, partial(unit.weights_pages, slot)))
            if not held:
                self._keep(update.unit, slot, writes[-1])
        for write in writes:
            while not write.done():
                yield write
            write.result()
        self._rewritten.add(update.unit)
        self._end(update, ended)

    def _keep(self, unit: int, slot: Tensor, write: Future[None]) -> None:
        """Gives the slot of an updated unit back when it is written; or keeps it, where the next step begins
        with it.
        """
        if unit != self._next:
            write.add_done_callback(_giving(self._slots, slot))
            return
        self._writing = write
        self._reads[unit] = Future()
        self._reads[unit].set_result(slot)

    def _change(self, piece: Piece, buffer: Tensor, weights: Tensor | None, update: Update) -> None:
        """See `Piece.in_buffer`."""
        rows = piece.in_buffer(buffer, weights)
        grads = update.grads(slice(rows.first, rows.first + len(rows.weights)))
        optim.update_slices(rows, grads, update.step)
        if update.changed is not None:
            update.changed(rows)
        if update.durable:
            # Into one tensor: small ones that stay, between the temporaries of the slices, would keep those
            # apart once they are freed, and the C library's heap would grow with every chunk.
            torch.hypot(update.norm, optim.gradient_norm(rows.weights), out=update.norm)

    def _end(self, update: Update, ended: Future[Any]) -> None:
        """The unit is updated. Where that is durable, the last unit of a block ends the block's file, and its
        units can be read again when the file is whole.
        """
        key = self._every[update.unit].key
        if not update.durable:
            ended.set_result(None)
            return
        self._rewritten.discard(update.unit)
        if self._last[key] == update.unit:
            self._written[key] = self._writer.submit(self.store.end, key, update.visits_done)
            block = [index for index, unit in enumerate(self._every) if unit.key == key]
            self._updated.update(dict.fromkeys(block, self._written[key]))

    def _read_chunk(self, key: str, piece: Piece, with_weights: bool, rewritten: bool) -> Tensor:
        buffer = self._chunks.take()
        try:
            self.store.read_pages(key, piece.parts(buffer, with_weights), rewritten)
        except BaseException:
            self._chunks.give(buffer)
            raise
        return buffer

    def _write_soon(self, key: str, parts: Parts, more: bool = False) -> Future[None]:
        """Writes rows as compute leaves them now. `more`: see `Store.write_pages`."""
        return self._writer.submit(self._write, key, parts, more, self.device.mark())

    def _write(self, key: str, parts: Parts, more: bool, mark: Mark) -> None:
        """`mark`: compute has changed the rows by then."""
        self.device.wait(mark)
        self.store.write_pages(key, parts(), more)

    def take_written(self) -> dict[str, Future[FileRecord]]:
        """The files of a durable step, by key, for the commit that names them."""
        written, self._written = self._written, {}
        return written

    # --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends the threads and frees the memory. Updates that are under way stop where they are.

        What is being written is written to its end: a commit may be waiting for it.
        """
        for pool in self._pools:
            pool.stop()
        for thread in (self._reader, self._chunk_reader):
            thread.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True)
        self._failed = self._writing = None
        theirs = (
            self._waiting,
            self._kept,
            self._held,
            self._reads,
            self._left,
            self._updated,
            self._written,
        )
        for every in theirs:
            every.clear()
        for pool in self._pools:
            pool.clear()

    @contextlib.contextmanager
    def _exposed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.exposed_s += time.perf_counter() - start


def _giving(pool: SlotPool, slot: Tensor, mark: Mark = None) -> Callable[[Future[None]], None]:
    """Gives a slot back when its write has ended, whether that has failed or not."""
    return lambda _: pool.give(slot, mark)
