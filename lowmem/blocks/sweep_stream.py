"""Moves a model through the device one block at a time, twice in each sweep of several steps.

    forward     the weights of a block, which are given back unchanged
    backward    the whole block, which is trained for several steps and then written back

While a block computes, a thread reads the next one and another writes the last one back. Blocks that the plan
has room for stay on the device. They move only when they are committed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from lowmem.blocks.arena import ArenaLayout, device_buffer
from lowmem.blocks.run_dir import FileRecord, block_key
from lowmem.blocks.staging import SlotPool
from lowmem.blocks.store import Store
from lowmem.blocks.stream import num_slots
from lowmem.blocks.unit import Pages
from lowmem.machine.device import Device, Mark
from lowmem.units import PAGE, round_up


def whole_pages(layout: ArenaLayout) -> Pages:
    return Pages(0, layout.total_bytes)


def weights_pages(layout: ArenaLayout) -> Pages:
    return Pages(0, layout.weights_bytes)


class SweepStream:
    """`load` a block, and `release` it unchanged or `keep` what it has become."""

    def __init__(
        self,
        store: Store,
        layouts: list[ArenaLayout],
        device: Device,
        stay: Collection[int],
        prefetch: bool,
    ) -> None:
        """`stay`: the blocks that are on the device all the time."""
        self.store, self.layouts, self.device, self.stay = store, layouts, device, stay
        self.exposed_s = 0.0  # seconds that compute waited for a block
        self._prefetch_on = prefetch
        moving = [layout for block, layout in enumerate(layouts) if block not in stay]
        size = max((layout.total_bytes for layout in moving), default=0)
        slots = num_slots(device.copies, prefetch, len(moving))
        self._slots = SlotPool(slots, lambda: device_buffer(device, size), device)
        if device.copies:
            # Made here and not on a thread: there the allocator could hand out memory that a kernel on the
            # default stream still uses.
            self._slots.fill()
            device.wait_for_compute()
        self._kept: dict[int, Tensor] = {}  # blocks that stay
        self._reads: dict[int, Future[Tensor]] = {}
        self._writes: dict[int, Future[Any]] = {}  # the last write of each block
        self._rewritten: set[int] = set()  # blocks whose newest bytes are in a file that no commit names yet
        self._written: dict[str, Future[FileRecord]] = {}  # durable files that no commit has named yet
        self._reader = ThreadPoolExecutor(1, "lowmem-sweep-reader")
        self._writer = ThreadPoolExecutor(1, "lowmem-sweep-writer")

    def load(self, block: int, whole: bool) -> Tensor:
        """Returns a buffer on the device that begins with the block's newest weights; `whole`: it is the
        block's arena, and may be changed.

        Raises the StoreError that a read or write of the block has met.
        """
        with self._exposed():
            if block in self.stay:
                return self._load_kept(block, whole)
            if block not in self._reads:
                self._start_read(block, whole)
            return self._reads[block].result()

    def prefetch(self, block: int, whole: bool) -> None:
        """Starts to fetch a block for the `load` that will come."""
        if self._prefetch_on and block not in self.stay and block not in self._reads:
            self._start_read(block, whole)

    def release(self, block: int) -> None:
        """Gives back what `load` has returned, unchanged."""
        if block not in self.stay:
            self._slots.give(self._reads.pop(block).result(), self.device.mark())

    def keep(self, block: int, visits_done: int, durable: bool) -> None:
        """Gives back a whole block that has changed. It is written beside compute where it does not stay, or
        where that is `durable`: to be committed under `visits_done`.
        """
        stays = block in self.stay
        if stays and not durable:
            return
        buffer = self._kept[block] if stays else self._reads.pop(block).result()
        mark = self.device.mark()
        if durable:
            end = self._writer.submit(self._write_durably, block, buffer, visits_done, mark)
            self._writes[block] = self._written[block_key(block)] = end
        else:
            self._writes[block] = self._writer.submit(self._write, block, buffer, visits_done, mark)

    def finish(self) -> None:
        """Waits until nothing is being written. Raises StoreError."""
        with self._exposed():
            for write in self._writes.values():
                write.result()

    def take_written(self) -> dict[str, Future[FileRecord]]:
        """The files of a durable sweep, by key, for the commit that names them."""
        written, self._written = self._written, {}
        return written

    def close(self) -> None:
        """Ends the threads and frees the memory.

        What is being written is written to its end: a commit may be waiting for it.
        """
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True)
        for held in (self._kept, self._reads, self._writes, self._written):
            held.clear()
        self._slots.clear()

    # --------------------------------------------------------------------------------------------------------

    def _load_kept(self, block: int, whole: bool) -> Tensor:
        if block not in self._kept:
            layout = self.layouts[block]
            buffer = device_buffer(self.device, layout.total_bytes)
            self.device.wait_for_compute()  # it may still use what the allocator now gives out as free
            self.store.read_pages(block_key(block), [(whole_pages(layout), buffer)], False)
            self._kept[block] = buffer
        if whole and block in self._writes:
            self._writes.pop(block).result()  # it is about to be changed
        return self._kept[block]

    def _start_read(self, block: int, whole: bool) -> None:
        self._reads[block] = self._reader.submit(self._read, block, whole, self._writes.get(block))

    def _read(self, block: int, whole: bool, write: Future[Any] | None) -> Tensor:
        key, layout = block_key(block), self.layouts[block]
        if write is not None:
            write.result()
        slot = self._slots.take()
        try:
            pages = whole_pages(layout) if whole else weights_pages(layout)
            self.store.read_pages(key, [(pages, slot[: pages.num_bytes])], block in self._rewritten)
        except BaseException:
            self._slots.give(slot)
            raise
        return slot

    def _write(self, block: int, buffer: Tensor, visits_done: int, mark: Mark) -> None:
        key, layout = block_key(block), self.layouts[block]
        try:
            self.device.wait(mark)
            self.store.begin(key, visits_done)
            self.store.write_pages(key, [(whole_pages(layout), buffer[: layout.total_bytes])])
            self._rewritten.add(block)
        finally:
            if block not in self.stay:
                self._slots.give(buffer)

    def _write_durably(self, block: int, buffer: Tensor, visits_done: int, mark: Mark) -> FileRecord:
        self._write(block, buffer, visits_done, mark)
        record = self.store.end(block_key(block), visits_done)
        self._rewritten.discard(block)
        return record

    @contextlib.contextmanager
    def _exposed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.exposed_s += time.perf_counter() - start


def page_bytes(pages: Pages, on_disk: bool) -> int:
    """Bytes that come when a store reads the pages: whole ones from the disk, and what counts from RAM."""
    return round_up(pages.stop, PAGE) - pages.first if on_disk else pages.inside_bytes
