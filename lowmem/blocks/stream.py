"""Moves blocks between the store and the device, beside compute.

A reader thread fetches the next block and a writer thread writes the last one back, both beside compute.
There are two ways for a block to be on the device:
    resident   every block has its own buffer there (tier device; tier host on unified memory)
    slots      the reader fills one of a few slots in the device's memory, and compute uses the slot itself
On a CPU a slot is host memory, and files are read straight into it; on CUDA the bytes pass the store's ring
of page-locked chunks. A slot that compute has used is handed on with a mark: the thread that takes it waits
for that mark, so `record_stream` is not needed. Compute runs on the default CUDA stream; nothing here waits
for the whole device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from lowmem.blocks.arena import ArenaLayout, aligned_buffer, device_buffer
from lowmem.blocks.run_dir import SHARED_KEY, FileRecord, block_key
from lowmem.blocks.staging import SlotPool, ring_bytes
from lowmem.blocks.store import Store
from lowmem.blocks.traffic import Traffic, TransferTimes
from lowmem.blocks.unit import Pages
from lowmem.machine.device import Device

HOST_SLOTS = 3  # on a CPU, at most: one in compute, one being filled, one being written
DEVICE_SLOTS = 2  # on a device of its own: one in compute, one being written and then filled

Committed = Callable[[dict[str, FileRecord]], None]  # the new files of a visit, by key


def num_slots(copied: bool, prefetch: bool, num_blocks: int) -> int:
    """Slots in the device's memory. `copied`: blocks pass a ring on their way. The plan counts with this too.

    Never more than there are blocks: a block is read only after its last write has ended, so one block never
    holds two slots.
    """
    return min((DEVICE_SLOTS if copied else HOST_SLOTS) - (0 if prefetch else 1), num_blocks)


def staging_bytes(
    slot_bytes: int, resident: bool, prefetch: bool, copied: bool, num_blocks: int, shared_bytes: int = 0
) -> tuple[int, int]:
    """Bytes of (device, host) that streaming takes beside the block in compute.

    `shared_bytes`: of the shared part, which passes the ring when it is written.

    On unified memory both come out of the same pool.
    """
    slots = 0 if resident else (num_slots(copied, prefetch, num_blocks) - 1) * slot_bytes
    return slots, ring_bytes(max(slot_bytes, shared_bytes)) if copied else 0


class BlockStream:
    """`load` a block, train it in place, `store` it. `close` ends the threads, and the store's."""

    def __init__(
        self,
        store: Store,
        layouts: list[ArenaLayout],
        shared_layout: ArenaLayout,
        device: Device,
        resident: bool,
        prefetch: bool,
    ) -> None:
        self.block_store, self.device, self.resident = store, device, resident
        self.layouts, self.shared_layout = layouts, shared_layout
        self.prefetch_on = prefetch and not resident
        self.exposed_s = 0.0  # seconds that compute waited for a block
        slot_bytes = max(layout.total_bytes for layout in layouts)
        copied = store.ring is not None
        self._slots = SlotPool(
            num_slots(copied, prefetch, len(layouts)), lambda: device_buffer(device, slot_bytes), device
        )
        self._fills = copied and not resident
        self._shared_slot = aligned_buffer(shared_layout.total_bytes)  # it takes memory when it is filled
        self._residents: dict[int, Tensor] = {}
        self._reader = ThreadPoolExecutor(1, "lowmem-reader")
        self._writer = ThreadPoolExecutor(1, "lowmem-writer")
        self._reads: dict[int, Future[Tensor]] = {}  # prefetched
        self._writes: dict[int, Future[Any]] = {}  # the last write of each block
        self._commit: Future[None] | None = None  # the last visit's

    # --------------------------------------------------------------------------------------------------------
    # Store -> device

    def load(self, block: int) -> Tensor:
        """Returns a buffer on the device that begins with the block's newest bytes (uint8).

        Waits for reads and writes of the block that are under way, and raises the StoreError that either met.
        """
        with self._exposed():
            if self.resident:
                return self._load_resident(block)
            read = self._reads.pop(block, None) or self._start_read(block)
            return read.result()

    def prefetch(self, block: int) -> None:
        """Starts to fetch a block for the `load` that will come."""
        if self.prefetch_on and block not in self._reads:
            self._reads[block] = self._start_read(block)

    def load_shared(self) -> Tensor:
        """Returns the shared part's newest bytes (uint8, [total_bytes]) in a new buffer on the device.

        Raises StoreError.
        """
        self.finish()  # it may still be being written
        return self.load_whole(SHARED_KEY, self.shared_layout)

    def load_shared_result(self) -> Tensor:
        """Returns the shared part's weights to use, flat, in new memory on the device, without the rest.

        Raises StoreError.
        """
        self.finish()
        dtype, first, num_bytes = self.shared_layout.result
        pages = Pages(first, first + num_bytes)
        buffer = aligned_buffer(pages.num_bytes)
        self.block_store.read_pages(SHARED_KEY, [(pages, buffer)], False)
        return pages.of(buffer, dtype).to(self.device.torch)

    def load_whole(self, key: str, layout: ArenaLayout) -> Tensor:
        """Returns the bytes of what is no block in a new buffer on the device. Raises StoreError."""
        buffer = aligned_buffer(layout.total_bytes)
        # Read in one piece and then moved: the ring counts blocks, and the plan does not count this.
        self.block_store.read(key, buffer)
        return buffer.to(self.device.torch)

    def _load_resident(self, block: int) -> Tensor:
        self._wait_for_write(block)
        if block not in self._residents:
            buffer = device_buffer(self.device, self.layouts[block].total_bytes)
            self.device.wait_for_compute()  # it may still use what the allocator now gives out as free
            self.block_store.read(block_key(block), buffer)
            self._residents[block] = buffer
        return self._residents[block]

    def _start_read(self, block: int) -> Future[Tensor]:
        if self._fills:
            # Here and not on the reader's thread: there the allocator could hand out memory that a kernel on
            # the default stream still uses. And not before the first block is asked for: where units stream,
            # no block ever is.
            self._slots.fill()
            self.device.wait_for_compute()
            self._fills = False
        return self._reader.submit(self._read, block)

    def _read(self, block: int) -> Tensor:
        self._wait_for_write(block)
        slot = self._slots.take()
        try:
            self.block_store.read(block_key(block), slot[: self.layouts[block].total_bytes])
        except BaseException:
            self._slots.give(slot)
            raise
        return slot

    # --------------------------------------------------------------------------------------------------------
    # Device -> store

    def store(
        self,
        trained: dict[int, Tensor],
        shared: Tensor | None,
        visits_done: int,
        committed: Committed,
        wait: bool,
        written: Mapping[str, Future[FileRecord]] | None = None,
        copies: Mapping[int, int] | None = None,
    ) -> None:
        """Writes the trained blocks and the shared part, then calls `committed` on the writer's thread with
        the new files. `written`: files that are being written already, by key; without `shared` the shared
        part's is among them. `copies`: blocks that become
        what a trained one is, by their number; only where all blocks are resident.

        With `wait` it returns when all of that is done. Else a snapshot of the shared part is written, it
        returns at once, and the blocks must not be touched until `load` returns them again.
        """
        self.finish()  # the snapshot's buffer is free only when the last one is written
        self.device.wait_for_compute()  # what it trained is about to be read by other threads
        assert self.resident or not copies, "a slot is given back before a copy could be written"
        everything = {**trained, **{copy: trained[block] for copy, block in (copies or {}).items()}}
        if shared is not None and (not wait or self.device.copies):
            self.block_store.copy_out(shared, self._shared_slot)
            shared = self._shared_slot
        self._commit = self._writer.submit(
            self._write_visit, everything, shared, written or {}, visits_done, committed
        )
        self._writes.update(dict.fromkeys(trained, self._commit))
        if wait:
            self._commit.result()

    def write_beside(self, block: int, buffer: Tensor, visits_done: int) -> Future[FileRecord]:
        """Starts to write a trained block, for a commit of other blocks too. It must not be touched until
        `load` returns it again.
        """
        self.device.wait_for_compute()
        write = self._writer.submit(self._write_block, block, buffer, visits_done)
        self._writes[block] = write
        return write

    def release(self, block: int, buffer: Tensor) -> None:
        """Gives back a block that was only read (sampling, evaluation)."""
        if not self.resident:
            self._slots.give(buffer, self.device.mark())

    def finish(self) -> None:
        """Waits until everything that was stored is committed. Raises what the writer raised."""
        if self._commit is not None:
            self._commit.result()

    def close(self) -> None:
        """Ends the threads and frees the blocks' memory at once, without waiting for a garbage collection."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True)
        self.block_store.close()
        for held in (self._residents, self._reads, self._writes):
            held.clear()
        self._slots.clear()

    def _write_visit(
        self,
        trained: dict[int, Tensor],
        shared: Tensor | None,
        written: Mapping[str, Future[FileRecord]],
        visits_done: int,
        committed: Committed,
    ) -> None:
        files = {key: write.result() for key, write in written.items()}
        for block, buffer in trained.items():
            files[block_key(block)] = self._write_block(block, buffer, visits_done)
        if shared is not None:
            files[SHARED_KEY] = self.block_store.write(SHARED_KEY, shared, visits_done)
        committed(files)

    def _write_block(self, block: int, buffer: Tensor, visits_done: int) -> FileRecord:
        key, part = block_key(block), buffer[: self.layouts[block].total_bytes]
        # The stack lets go of the buffer once, also where the disk is full: the reader may be waiting for it.
        with contextlib.ExitStack() as held:
            if not self.resident:
                held.callback(self._slots.give, buffer)
            source = self.block_store.take_over(key, part)
            if source is not part:
                held.close()  # the bytes are in RAM: the slot is free before they are on the disk
            return self.block_store.write(key, source, visits_done)

    # --------------------------------------------------------------------------------------------------------
    # Figures

    def facts(self) -> dict[str, Any]:
        """How blocks pass, for the run's record: the ring has fewer chunks, or pageable ones, where
        page-locking was refused.
        """
        return {"resident": self.resident, **self.block_store.facts()}

    def traffic(self) -> Traffic:
        """Bytes moved since the stream was opened."""
        return self.block_store.traffic()

    def transfer_s(self) -> TransferTimes:
        """Seconds that this traffic took, whether or not compute waited for it."""
        return self.block_store.transfer_s()

    # --------------------------------------------------------------------------------------------------------

    def wait_for(self, key: str) -> None:
        """Waits until a block's newest bytes can be read from the store."""
        self._wait_for_write(int(key.rpartition("-")[2]))

    def _wait_for_write(self, block: int) -> None:
        write = self._writes.get(block)
        if write is not None:
            write.result()

    @contextlib.contextmanager
    def _exposed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.exposed_s += time.perf_counter() - start
