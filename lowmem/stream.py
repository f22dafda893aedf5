"""One block at a time on the device: the next is fetched and the last written back on threads, beside compute.

Three ways a block gets to the device, one interface:
    resident   every block has its own buffer on the device (tier device; tier host where host memory *is* the device's)
    staged     a reader thread fills one of at most three host slots, and compute uses the slot itself (CPU, tier disk)
    copied     the slot is copied to one of two device slots on a stream of its own (CUDA, tiers host and disk)
A slot's life is guarded by its thread: it is handed on only when the copy or the write that uses it has finished, so neither
events across threads nor `record_stream` are needed. Compute runs on the default stream; nothing here synchronises the device.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lowmem.arena import ArenaLayout, aligned_buffer
from lowmem.run_dir import FileRecord
from lowmem.store import DiskStore

HOST_SLOTS = 3  # at most: one computed on (or copied from), one filled, one written
DEVICE_SLOTS = 2


def block_key(block: int) -> str:
    return f"block-{block}"


class SlotPool:
    """At most `size` buffers, made when first needed; `take` waits for a free one."""

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


class BlockStream:
    """`load` blocks, train them in place, `store` them. One reader and one writer thread; `close` ends both."""

    def __init__(
        self,
        store: DiskStore,
        layouts: list[ArenaLayout],
        shared_layout: ArenaLayout,
        device: torch.device,
        resident: bool,
        prefetch: bool,
        pinned_max_bytes: int = 0,
    ) -> None:
        self.block_store, self.layouts, self.device, self.resident = store, layouts, device, resident
        self.prefetch_on = prefetch and not resident
        self.host_to_device_bytes = self.device_to_host_bytes = 0
        self.exposed_s = 0.0  # seconds that compute stood waiting for a block
        slot_bytes = max(layout.total_bytes for layout in layouts)
        on_cuda = device.type == "cuda"
        pin = on_cuda and HOST_SLOTS * slot_bytes <= pinned_max_bytes
        self._host = SlotPool(host_slots(resident, prefetch), lambda: _host_slot(slot_bytes, pin))
        self._device = SlotPool(device_slots(prefetch), lambda: torch.empty(slot_bytes, dtype=torch.uint8, device=device))
        if on_cuda and not resident:  # made here: memory taken from the allocator on a thread could still be in use by the default stream
            self._device.fill()
            torch.cuda.synchronize(device)
        self._shared_slot = aligned_buffer(shared_layout.total_bytes)
        self._residents: dict[int, Tensor] = {}
        self._copies_in = on_cuda
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if on_cuda else None  # type: ignore[no-untyped-call]
        self._reader = ThreadPoolExecutor(1, "lowmem-reader")
        self._writer = ThreadPoolExecutor(1, "lowmem-writer")
        self._reads: dict[tuple[int, bool], Future[Tensor]] = {}
        self._writes: dict[int, Future[Any]] = {}
        self._step_writes: dict[int, Future[FileRecord]] = {}  # durable, not yet handed to a commit
        self._kept: dict[int, Future[None]] = {}  # a kept block -> done when its write no longer needs the buffer
        self._shared_write: Future[None] | None = None

    # -----------------------------------------------------------------------------------------------------------------
    # Device <- store

    def load(self, block: int, weights_only: bool = False) -> Tensor:
        """The block's buffer on the device, newest bytes. Waits for what is under way; raises StoreError of either thread.

        `weights_only`: for a pass without an update; what lies behind the weights is then anything.
        """
        with self._exposed():
            if not self.resident:
                return self._start_read(block, weights_only).result()
            self._wait_for_write(block)
            if block not in self._residents:
                self._residents[block] = self._to_resident(block)
            return self._residents[block]

    def prefetch(self, block: int, weights_only: bool = False) -> None:
        """Starts fetching a block that is not on the device, for the `load` that will ask for as much of it."""
        if self.prefetch_on:
            self._start_read(block, weights_only, keep=True)

    def _start_read(self, block: int, weights_only: bool, keep: bool = False) -> Future[Tensor]:
        future = self._reads.pop((block, weights_only), None) or self._reader.submit(self._read, block, weights_only)
        if keep:
            self._reads[block, weights_only] = future
        return future

    def _read(self, block: int, weights_only: bool) -> Tensor:
        self._wait_for_write(block)
        num_bytes = self.layouts[block].weights_read_bytes if weights_only else self.layouts[block].total_bytes
        slot = self._host.take()
        try:
            self.block_store.read(block_key(block), slot[:num_bytes])
        except BaseException:
            self._host.give(slot)
            raise
        if not self._copies_in:
            return slot
        target = self._device.take()
        self._copy(target, slot, num_bytes, 0)
        self._host.give(slot)
        return target

    def _to_resident(self, block: int) -> Tensor:
        num_bytes = self.layouts[block].total_bytes
        if not self._copies_in:
            buffer = aligned_buffer(num_bytes)
            self.block_store.read(block_key(block), buffer)
            return buffer
        slot = self._host.take()
        self.block_store.read(block_key(block), slot[:num_bytes])
        buffer = slot[:num_bytes].to(self.device)
        self.host_to_device_bytes += num_bytes
        self._host.give(slot)
        return buffer

    # -----------------------------------------------------------------------------------------------------------------
    # Device -> store

    def store(
        self, trained: dict[int, Tensor], shared: Tensor, visits_done: int, committed: Callable[[dict[str, FileRecord]], None], wait: bool
    ) -> None:
        """Writes trained blocks and a snapshot of the shared part, then calls `committed` with the new files, on the writer's thread.

        With `wait` returns when all that is done, else at once: the blocks must then not be touched until `load` gives them again.
        """
        self.finish()  # the last snapshot of the shared part may still be being written
        self._shared_slot.copy_(shared)  # on CUDA this waits for the visit's last kernel, so the writer may read the blocks
        if shared.is_cuda:
            self.device_to_host_bytes += shared.numel()
        written, self._step_writes = self._step_writes, {}
        future = self._writer.submit(self._write, trained, written, visits_done, committed)
        self._shared_write = future
        self._writes.update(dict.fromkeys(trained, future))
        if wait:
            future.result()

    def write_back(self, block: int, buffer: Tensor, visits_done: int, durable: bool, keep: bool = False) -> None:
        """Writes one trained block beside compute: a working copy, or (`durable`) the file that the next `store` commits.

        `keep`: the buffer stays with the caller, to be read only, until `release`. Raises what an earlier write raised.
        """
        for write in self._writes.values():
            if write.done():
                write.result()
        if buffer.is_cuda:
            torch.cuda.current_stream(self.device).synchronize()  # the kernels that trained it
        if keep:
            self._kept[block] = Future()
        self._writes[block] = future = self._writer.submit(self._write_block, block, buffer, visits_done, durable, self._kept.get(block))
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

    def _write_block(self, block: int, buffer: Tensor, visits_done: int, durable: bool = True, kept: Future[None] | None = None) -> FileRecord:
        num_bytes = self.layouts[block].total_bytes
        slot = buffer
        if buffer.is_cuda:
            slot = self._host.take()
            self._copy(slot, buffer, num_bytes, 1)
            if kept is not None:
                kept.set_result(None)
            elif not self.resident:
                self._device.give(buffer)
        try:
            return self.block_store.write(block_key(block), slot[:num_bytes], visits_done, durable)
        finally:
            if buffer.is_cuda or (kept is None and not self.resident):
                self._host.give(slot)
            elif kept is not None:
                kept.set_result(None)

    def release(self, block: int, buffer: Tensor) -> None:
        """Gives back a block that was only read (sampling, evaluation, a forward pass), once a write of it has let go."""
        if self.resident:
            return
        if buffer.is_cuda:
            torch.cuda.current_stream(self.device).synchronize()  # kernels that read it
        pool, kept = self._device if buffer.is_cuda else self._host, self._kept.pop(block, None)
        if kept is None:
            pool.give(buffer)
        else:
            kept.add_done_callback(lambda _: pool.give(buffer))

    def finish(self) -> None:
        """Waits until everything stored is committed. Raises what the writer raised."""
        if self._shared_write is not None:
            self._shared_write.result()

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True)

    # -----------------------------------------------------------------------------------------------------------------

    def _wait_for_write(self, block: int) -> None:
        write = self._writes.get(block)
        if write is not None:
            write.result()

    def _copy(self, target: Tensor, source: Tensor, num_bytes: int, way: int) -> None:
        """A host-device copy on its own stream (0 in, 1 out). Returns when it has finished; only the calling thread waits."""
        assert self._streams is not None
        with torch.cuda.stream(self._streams[way]):
            target[:num_bytes].copy_(source[:num_bytes], non_blocking=True)
        self._streams[way].synchronize()
        if way == 0:
            self.host_to_device_bytes += num_bytes
        else:
            self.device_to_host_bytes += num_bytes

    @contextlib.contextmanager
    def _exposed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.exposed_s += time.perf_counter() - start


def host_slots(resident: bool, prefetch: bool) -> int:
    """Staging slots on the host: the plan counts the same number."""
    return 1 if resident else (HOST_SLOTS if prefetch else HOST_SLOTS - 1)


def device_slots(prefetch: bool) -> int:
    return DEVICE_SLOTS if prefetch else 1


def _host_slot(num_bytes: int, pin: bool) -> Tensor:
    buffer = aligned_buffer(num_bytes)
    if pin:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(buffer.data_ptr(), num_bytes, 0)) != 0:
            with contextlib.suppress(RuntimeError):  # refused: the slot stays pageable; take the error that the next call would meet
                torch.zeros(1, device="cuda")
    return buffer
