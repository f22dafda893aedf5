"""What crosses the borders between blocks in a step of exact back-propagation, kept while the blocks come and
go.

Row b holds the input of block b, of every micro-batch; one row more holds the gradient of the border that the
backward pass is at. On the device nothing moves. Away from it (host memory beside a CUDA device, or a file
without a name) tensors go out and come back on a thread beside compute. The order of a step is known before
it begins, so what is needed next is fetched early, and the last that went out are kept at hand: what moves is
a function of the order alone, which the plan counts with the same code (`Window`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem.blocks.arena import PAGE, aligned_buffer
from lowmem.blocks.order import Place, border_calls
from lowmem.errors import StoreError
from lowmem.recipe import Tier
from lowmem.units import round_up

AT_HAND = 2  # tensors that went out last and are still here
AHEAD = 2  # tensors that are fetched before they are asked for
IN_USE = 2  # an input and a gradient
RANDOM_STATE_BYTES = 5056  # of the generator on the CPU, kept for each block and micro-batch


class Window:
    """Which tensors of a step are at hand, and which to fetch when."""

    def __init__(self, order: Iterator[tuple[bool, Place]]) -> None:
        self._order, self._position = list(order), 0
        self._at_hand: list[Place] = []  # oldest first
        self._fetched: set[Place] = set()

    def put(self, place: Place) -> None:
        self._step(True, place)
        self._at_hand = [*self._at_hand, place][-AT_HAND:]

    def get(self, place: Place) -> tuple[bool, list[Place]]:
        """Whether the place must be fetched now, being neither at hand nor on its way; and what to fetch for
        the gets that come soon.
        """
        self._step(False, place)
        missing, wanted = place not in self._fetched and place not in self._at_hand, list[Place]()
        self._fetched.discard(place)
        puts = list[Place]()
        gets = 0
        for is_put, other in islice(self._order, self._position, None):
            if is_put:
                puts.append(other)
                continue
            if gets == AHEAD:
                break
            gets += 1
            then_at_hand = other in [*self._at_hand, *puts][-AT_HAND:]
            if not then_at_hand and other not in puts and other not in self._fetched:
                wanted.append(other)
                self._fetched.add(other)
        return missing, wanted

    def _step(self, is_put: bool, place: Place) -> None:
        assert self._order[self._position] == (is_put, place), (
            "a step's calls come in the order of `border_calls`"
        )
        self._position += 1


class BorderBytes(NamedTuple):
    """What the borders take, by tier, and what of them a step moves."""

    device: int = 0
    host: int = 0
    disk: int = 0
    host_to_device: int = 0
    device_to_host: int = 0
    disk_read: int = 0
    disk_written: int = 0


def border_bytes(
    tier: Tier, unified: bool, border: int, waiting: int, num_blocks: int, parts: int, two_passes: bool
) -> BorderBytes:
    """`border`, `waiting`: bytes of a micro-batch at one border, and of what else of it waits on the device
    for the whole step.
    """
    states, slot, count = (
        num_blocks * parts * RANDOM_STATE_BYTES,
        round_up(border, PAGE),
        (num_blocks + 1) * parts,
    )
    if tier == "device":
        return BorderBytes(device=parts * waiting + count * border, host=states)
    order = list(border_calls(num_blocks, parts, two_passes))
    window, fetched, puts = Window(iter(order)), 0, 0
    for is_put, place in order:
        if is_put:
            window.put(place)
            puts += 1
        else:
            missing, wanted = window.get(place)
            fetched += missing + len(wanted)
    on_disk = tier == "disk"
    return BorderBytes(
        device=parts * waiting + (AT_HAND + AHEAD + IN_USE) * border,
        host=states + (slot if on_disk else count * slot),
        disk=count * slot if on_disk else 0,
        host_to_device=0 if unified else fetched * border,
        device_to_host=0 if unified else puts * border,
        disk_read=fetched * slot if on_disk else 0,
        disk_written=puts * slot if on_disk else 0,
    )


class Borders:
    """Tensors [B, T, D] of one step by place, on the device."""

    exposed_s = 0.0
    host_to_device_bytes = device_to_host_bytes = disk_read_bytes = disk_written_bytes = 0

    def __init__(self, num_blocks: int, parts: int, two_passes: bool) -> None:
        self.num_blocks, self.parts, self.two_passes = num_blocks, parts, two_passes
        self._there: dict[Place, Tensor] = {}

    def begin(self) -> None:
        """A step begins."""
        self._there.clear()

    def put(self, place: Place, h: Tensor) -> None:
        self._there[place] = h

    def get(self, place: Place) -> Tensor:
        return self._there[place]

    def traffic(self) -> dict[str, int]:
        """Bytes moved so far."""
        return {
            name: getattr(self, name)
            for name in (
                "host_to_device_bytes",
                "device_to_host_bytes",
                "disk_read_bytes",
                "disk_written_bytes",
            )
        }

    def close(self) -> None:
        self._there.clear()


class AwayBorders(Borders):
    """The same, with all but a few tensors in host memory (`folder` None) or in a file of `folder` that no
    name leads to.
    """

    def __init__(
        self, num_blocks: int, parts: int, two_passes: bool, device: torch.device, folder: Path | None
    ) -> None:
        super().__init__(num_blocks, parts, two_passes)
        self._device, self._folder = device, folder
        self._thread = ThreadPoolExecutor(1, "lowmem-borders")
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []  # type: ignore[no-untyped-call]
        self._file = None if folder is None else _open_unnamed(folder / "borders.tmp")
        self._rest: Tensor | None = None  # all places in host memory, or one slot for the file
        self._window = Window(iter(()))
        self._at_hand: list[tuple[Place, Tensor, Future[None]]] = []  # oldest first
        self._fetched: dict[Place, Future[Tensor]] = {}

    def begin(self) -> None:
        for _, _, written in self._at_hand:
            written.result()
        self._at_hand.clear()
        self._window = Window(border_calls(self.num_blocks, self.parts, self.two_passes))

    def put(self, place: Place, h: Tensor) -> None:
        self._window.put(place)
        h = h.detach().contiguous()
        if self._rest is None:
            self._like, self._slot_bytes = (
                torch.empty_like(h, device="meta"),
                round_up(h.numel() * h.element_size(), PAGE),
            )
            self._rest = aligned_buffer(
                self._slot_bytes * (1 if self._file is not None else (self.num_blocks + 1) * self.parts)
            )
        self.device_to_host_bytes += h.numel() * h.element_size() if self._streams else 0
        self.disk_written_bytes += self._slot_bytes if self._file is not None else 0
        self._at_hand.append((place, h, self._thread.submit(self._out, place, h, self._now())))
        if len(self._at_hand) > AT_HAND:
            self._waited(self._at_hand.pop(0)[2])

    def get(self, place: Place) -> Tensor:
        missing, wanted = self._window.get(place)
        on_its_way = self._fetch(place) if missing else self._fetched.pop(place, None)
        self._fetched.update({other: self._fetch(other) for other in wanted})
        if on_its_way is None:
            return next(h for other, h, _ in reversed(self._at_hand) if other == place)
        return torch.as_tensor(self._waited(on_its_way))

    def _fetch(self, place: Place) -> Future[Tensor]:
        target = torch.empty_like(
            self._like, device=self._device
        )  # made here: its memory belongs to the stream that computes
        self.host_to_device_bytes += target.numel() * target.element_size() if self._streams else 0
        self.disk_read_bytes += self._slot_bytes if self._file is not None else 0
        return self._thread.submit(self._in, place, target, self._now())

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._file is not None:
            os.close(self._file)

    # --------------------------------------------------------------------------------------------------------
    # On the thread

    def _out(self, place: Place, h: Tensor, ready: torch.cuda.Event | None) -> None:
        slot, flat = self._slot(place), h.flatten().view(torch.uint8)
        self._copy(slot[: len(flat)], flat, ready, 1)
        if self._file is not None:
            self._request(os.pwrite(self._file, memoryview(slot.numpy().data), self._offset(place)))

    def _in(self, place: Place, target: Tensor, ready: torch.cuda.Event | None) -> Tensor:
        slot, flat = self._slot(place), target.flatten().view(torch.uint8)
        if self._file is not None:
            self._request(os.preadv(self._file, [memoryview(slot.numpy().data)], self._offset(place)))
        self._copy(flat, slot[: len(flat)], ready, 0)
        return target

    def _copy(self, target: Tensor, source: Tensor, ready: torch.cuda.Event | None, way: int) -> None:
        """`ready`: when compute has made the source, or is done with what lay where the target lies.

        Returns when the bytes are there.
        """
        if ready is None:
            target.copy_(source)
            return
        stream = self._streams[way]
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        stream.synchronize()

    # --------------------------------------------------------------------------------------------------------

    def _slot(self, place: Place) -> Tensor:
        assert self._rest is not None
        if self._file is not None:
            return self._rest
        start = self._offset(place)
        return self._rest[start : start + self._slot_bytes]

    def _offset(self, place: Place) -> int:
        return (place[0] * self.parts + place[1]) * self._slot_bytes

    def _now(self) -> torch.cuda.Event | None:
        return torch.cuda.current_stream(self._device).record_event() if self._streams else None

    def _waited(self, future: Future[Any]) -> Any:
        start = time.perf_counter()
        result = future.result()
        self.exposed_s += time.perf_counter() - start
        return result

    def _request(self, moved: int) -> None:
        if moved != self._slot_bytes:
            raise StoreError(
                f"{self._folder}: moved {moved} of {self._slot_bytes} bytes of an activation; the disk is full or failing; free space, then run again"
            )


def _open_unnamed(path: Path) -> int:
    """A file for unbuffered reads and writes (where the file system knows them) that is gone when the process
    ends, however it ends.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
    try:
        try:
            file = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o600)
        except OSError:
            file = os.open(path, flags, 0o600)
        path.unlink()
    except OSError as problem:
        raise StoreError(f"{path}: {problem.strerror}; mend this, then run the same command again") from None
    return file
