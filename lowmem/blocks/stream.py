"""One block at a time on the device: the next is fetched and the last written back on threads, beside
compute.

Two ways a block gets to the device, one interface:
    resident   every block has its own buffer on the device (tier device; tier host where host memory *is* the device's)
    slots      a reader thread fills one of a few slots in the device's memory, and compute uses the slot itself
On a CPU a slot is host memory and files are read straight into it; on CUDA bytes pass the store's ring of page-locked chunks.
A slot's life is guarded by its thread: it is handed on only when the copy or the write that uses it has finished, so neither
events across threads nor `record_stream` are needed. Compute runs on the default stream; nothing here synchronises the device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lowmem.blocks.arena import ALIGNMENT, ArenaLayout, aligned_buffer
from lowmem.blocks.run_dir import FileRecord
from lowmem.blocks.staging import IN, OUT, SlotPool, ring_bytes
from lowmem.blocks.store import DiskStore

HOST_SLOTS = 3  # on a CPU, at most: one computed on, one filled, one written
DEVICE_SLOTS = 2  # on a device of its own: one computed on, one written and then filled


def block_key(block: int) -> str:
    return f"block-{block}"


def num_slots(copied: bool, prefetch: bool, num_blocks: int) -> int:
    """Slots in the device's memory; `copied`: blocks pass a ring on their way. The plan counts the same
    number.

    No more than blocks: one is not read before its last write has ended, so it never takes two.
    """
    return min((DEVICE_SLOTS if copied else HOST_SLOTS) - (0 if prefetch else 1), num_blocks)


def staging_bytes(
    slot_bytes: int, resident: bool, prefetch: bool, copied: bool, num_blocks: int
) -> tuple[int, int]:
    """What streaming takes of (device, host) memory beside the block in compute.

    On unified memory both are the same pool.
    """
    slots = 0 if resident else (num_slots(copied, prefetch, num_blocks) - 1) * slot_bytes
    return slots, ring_bytes(slot_bytes) if copied else 0


class BlockStream:
    """`load` blocks, train them in place, `store` them.

    One reader and one writer thread; `close` ends both and the store's.
    """

    def __init__(
        self,
        store: DiskStore,
        layouts: list[ArenaLayout],
        shared_layout: ArenaLayout,
        device: torch.device,
        resident: bool,
        prefetch: bool,
    ) -> None:
        self.block_store, self.layouts, self.device, self.resident = store, layouts, device, resident
        self.prefetch_on = prefetch and not resident
        self.exposed_s = 0.0  # seconds that compute stood waiting for a block
        slot_bytes = max(layout.total_bytes for layout in layouts)
        copied = store.ring is not None
        self._slots = SlotPool(num_slots(copied, prefetch, len(layouts)), lambda: self._buffer(slot_bytes))
        if (
            copied and not resident
            # made here: memory taken from the allocator on a thread could still be in use by the default stream
        ):
            self._slots.fill()
            self._wait_for_kernels()
        self._shared_slot = aligned_buffer(shared_layout.total_bytes)
        self._residents: dict[int, Tensor] = {}
        self._reader = ThreadPoolExecutor(1, "lowmem-reader")
        self._writer = ThreadPoolExecutor(1, "lowmem-writer")
        self._reads: dict[tuple[int, bool], Future[Tensor]] = {}
        self._writes: dict[int, Future[Any]] = {}
        self._step_writes: dict[int, Future[FileRecord]] = {}  # durable, not yet handed to a commit
        self._kept: dict[
            int, Future[None]
        ] = {}  # a kept block -> done when its write no longer needs the buffer
        self._shared_write: Future[None] | None = None

    # --------------------------------------------------------------------------------------------------------
    # Device <- store

    def load(self, block: int, weights_only: bool = False) -> Tensor:
        """The block's buffer on the device, newest bytes. Waits for what is under way; raises StoreError of
        either thread.

        `weights_only`: for a pass without an update; what lies behind the weights is then anything.
        """
        with self._exposed():
            if not self.resident:
                return self._start_read(block, weights_only).result()
            self._wait_for_write(block)
            if block not in self._residents:
                buffer = self._buffer(self.layouts[block].total_bytes)
                self._wait_for_kernels()  # that used this memory before
                self.block_store.read(block_key(block), buffer)
                self._residents[block] = buffer
            return self._residents[block]

    def prefetch(self, block: int, weights_only: bool = False) -> None:
        """Starts fetching a block that is not on the device, for the `load` that will ask for as much of it."""
        if self.prefetch_on:
            self._start_read(block, weights_only, keep=True)

    def _start_read(self, block: int, weights_only: bool, keep: bool = False) -> Future[Tensor]:
        future = self._reads.pop((block, weights_only), None) or self._reader.submit(
            self._read, block, weights_only
        )
        if keep:
            self._reads[block, weights_only] = future
        return future

    def _read(self, block: int, weights_only: bool) -> Tensor:
        self._wait_for_write(block)
        num_bytes = (
            self.layouts[block].weights_read_bytes if weights_only else self.layouts[block].total_bytes
        )
        slot = self._slots.take()
        try:
            self.block_store.read(block_key(block), slot[:num_bytes])
        except BaseException:
            self._slots.give(slot)
            raise
        return slot

    def _buffer(self, num_bytes: int) -> Tensor:
        if self.device.type == "cpu":
            return aligned_buffer(num_bytes)
        whole = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8, device=self.device)
        return whole[
            ALIGNMENT:
        ]  # torch.compile takes a view at storage offset 0 for a special case, and compiles again

    # --------------------------------------------------------------------------------------------------------
    # Device -> store

    def store(
        self,
        trained: dict[int, Tensor],
        shared: Tensor,
        visits_done: int,
        committed: Callable[[dict[str, FileRecord]], None],
        wait: bool,
    ) -> None:
        """Writes trained blocks and a snapshot of the shared part, then calls `committed` with the new files,
        on the writer's thread.

        With `wait` returns when all that is done, else at once: the blocks must then not be touched until
        `load` gives them again.
        """
        self.finish()  # the last snapshot of the shared part may still be being written
        self._wait_for_kernels()  # the visit's last: from here on the threads may read what it trained
        self.block_store.copy_out(shared, self._shared_slot)
        written, self._step_writes = self._step_writes, {}
        future = self._writer.submit(self._write, trained, written, visits_done, committed)
        self._shared_write = future
        self._writes.update(dict.fromkeys(trained, future))
        if wait:
            future.result()

    def write_back(
        self, block: int, buffer: Tensor, visits_done: int, durable: bool, keep: bool = False
    ) -> None:
        """Writes one trained block beside compute: a working copy, or (`durable`) the file that the next
        `store` commits.

        `keep`: the buffer stays with the caller, to be read only, until `release`. Raises what an earlier
        write raised.
        """
        for write in self._writes.values():
            if write.done():
                write.result()
        self._wait_for_kernels()  # that trained it
        if keep:
            self._kept[block] = Future()
        self._writes[block] = future = self._writer.submit(
            self._write_block, block, buffer, visits_done, durable, self._kept.get(block)
        )
        if durable:
            self._step_writes[block] = future

    def _write(
        self,
        trained: dict[int, Tensor],
        written: dict[int, Future[FileRecord]],
        visits_done: int,
        committed: Callable[[dict[str, FileRecord]], None],
    ) -> None:
        files = {block_key(block): write.result() for block, write in written.items()}
        for block, buffer in trained.items():
            files[block_key(block)] = self._write_block(block, buffer, visits_done)
        files["shared"] = self.block_store.write("shared", self._shared_slot, visits_done)
        committed(files)

    def _write_block(
        self,
        block: int,
        buffer: Tensor,
        visits_done: int,
        durable: bool = True,
        kept: Future[None] | None = None,
    ) -> FileRecord:
        store, key, part, held = (
            self.block_store,
            block_key(block),
            buffer[: self.layouts[block].total_bytes],
            True,
        )

        def let_go() -> None:
            nonlocal held
            if held and kept is not None:
                kept.set_result(None)
            elif held and not self.resident:
                self._slots.give(buffer)
            held = False

        try:
            rest = store.keep(key, part)
            if rest is not part:
                let_go()
            return store.write(key, rest, visits_done, durable)
        finally:  # also where the disk is full: the reader may be waiting for the slot
            let_go()

    def release(self, block: int, buffer: Tensor) -> None:
        """Gives back a block that was only read (sampling, evaluation, a forward pass), once a write of it
        has let go.
        """
        if self.resident:
            return
        self._wait_for_kernels()  # that read it
        kept = self._kept.pop(block, None)
        if kept is None:
            self._slots.give(buffer)
        else:
            kept.add_done_callback(lambda _: self._slots.give(buffer))

    def finish(self) -> None:
        """Waits until everything stored is committed. Raises what the writer raised."""
        if self._shared_write is not None:
            self._shared_write.result()

    def close(self) -> None:
        """Ends the threads, and lets go of the blocks: what comes next in the process has their room at once,
        not at some later collection.
        """
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True)
        self.block_store.close()
        for held in (self._residents, self._reads, self._writes, self._step_writes, self._kept):
            held.clear()
        self._slots.clear()

    def facts(self) -> dict[str, Any]:
        """For a record of the run: where blocks pass, and the ring's chunks (fewer, or pageable, where
        page-locking was refused).
        """
        store = self.block_store
        return {
            "resident": self.resident,
            "past_page_cache": store.direct,
            **({} if store.ring is None else store.ring.facts()),
        }

    def traffic(self) -> dict[str, int]:
        """Bytes since the stream was opened, over the link and to and from the disk."""
        store, ring = self.block_store, self.block_store.ring
        passed = [0, 0] if ring is None else ring.passed_bytes
        return {
            "host_to_device_bytes": passed[IN],
            "device_to_host_bytes": passed[OUT],
            "disk_read_bytes": store.read_bytes,
            "disk_written_bytes": store.written_bytes,
        }

    def transfer_s(self) -> dict[str, float]:
        """Seconds that this traffic took, beside compute or not."""
        store, ring = self.block_store, self.block_store.ring
        copied = [0.0, 0.0] if ring is None else ring.copy_s
        return {
            "host_to_device_s": copied[IN],
            "device_to_host_s": copied[OUT],
            "disk_read_s": store.read_s,
            "disk_written_s": store.write_s,
        }

    # --------------------------------------------------------------------------------------------------------

    def _wait_for_write(self, block: int) -> None:
        write = self._writes.get(block)
        if write is not None:
            write.result()

    def _wait_for_kernels(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    @contextlib.contextmanager
    def _exposed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.exposed_s += time.perf_counter() - start
