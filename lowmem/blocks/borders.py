"""Keeps the activations at the borders between blocks, in a step of exact back-propagation whose blocks come
and go.

Row b holds the input of block b, for every micro-batch; one row more holds the gradient of the border that
the backward pass has reached. Rows after that are kept from step to step. `NearBorders` keeps all of them on
the device. `AwayBorders` keeps them in host memory, or in a file without a name, and moves them on a thread
beside compute. The order of a step's calls is known before it begins (`order.border_calls`), so what is
needed next is fetched early, and what went out last is still at hand. What moves is a function of that order
alone: the plan counts it with the same code (`Window`).
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lowmem.blocks.arena import aligned_buffer
from lowmem.blocks.block_file import REFUSED_DIRECT
from lowmem.blocks.order import WHOLE, Course, Place, border_calls
from lowmem.blocks.staging import Ring
from lowmem.blocks.traffic import Traffic
from lowmem.errors import StoreError
from lowmem.files import open_regular, refusals_of
from lowmem.machine.device import Device, Mark
from lowmem.machine.heap import MMAP_THRESHOLD_BYTES
from lowmem.recipe import Tier
from lowmem.units import PAGE, round_up

AT_HAND = 2  # tensors that went out last and are still on the device
AHEAD = 2  # tensors that are fetched before they are asked for
IN_USE = 2  # tensors that compute holds: an input and a gradient
RANDOM_STATE_BYTES = 5056  # the CPU generator's state, kept for each block and micro-batch
T = TypeVar("T")


class Window:
    """Follows a step's calls, and tells which tensors are at hand and which to fetch when."""

    def __init__(self, order: Iterator[tuple[bool, Place]]) -> None:
        self._order, self._position = list(order), 0
        self._at_hand: list[Place] = []  # oldest first
        self._fetched: set[Place] = set()  # on their way, or here and not yet asked for

    def put(self, place: Place) -> None:
        self._step(True, place)
        self._at_hand = [*self._at_hand, place][-AT_HAND:]

    def get(self, place: Place) -> tuple[bool, list[Place]]:
        """Tells whether the place must be fetched now, being neither at hand nor on its way, and which places
        to fetch for the gets that follow.
        """
        self._step(False, place)
        missing = place not in self._fetched and place not in self._at_hand
        self._fetched.discard(place)
        wanted, puts, gets = list[Place](), list[Place](), 0
        for is_put, other in islice(self._order, self._position, None):
            if is_put:
                puts.append(other)
                continue
            if gets == AHEAD:
                break
            gets += 1
            # What is still at hand when its turn comes is not fetched. What has yet to be put cannot be.
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
    """Bytes that the borders take, by tier, and what they move in a step."""

    device: int = 0
    host: int = 0
    disk: int = 0
    traffic: Traffic = Traffic()


def border_bytes(
    tier: Tier,
    unified: bool,
    border: int,
    waiting: int,
    num_blocks: int,
    parts: int,
    two_passes: bool,
    kept: int = 0,
    course: Course = WHOLE,
    kind: str = "cpu",
) -> BorderBytes:
    """Counts the borders of a step over `parts` micro-batches.

    `border`: bytes of one micro-batch at one border. `waiting`: bytes of a micro-batch that stay on the
    device for the whole step (the condition and the like). `kept`: rows that stay from step to step.
    `kind`: of the device.
    """
    count = (num_blocks + 1 + kept) * parts
    states = (num_blocks + (1 + kept if kept else 0)) * parts * RANDOM_STATE_BYTES
    slot, on_disk = round_up(border, PAGE), tier == "disk"
    if tier == "device":
        each = slot if in_one_buffer(border, kind) else border
        return BorderBytes(device=parts * waiting + count * each, host=states)
    puts, gets = moved_in_a_step(num_blocks, parts, two_passes, course)
    return BorderBytes(
        device=parts * waiting + (AT_HAND + AHEAD + IN_USE) * border,
        host=states + (slot if on_disk else count * slot),
        disk=count * slot if on_disk else 0,
        traffic=Traffic(
            host_to_device_bytes=0 if unified else gets * border,
            device_to_host_bytes=0 if unified else puts * border,
            disk_read_bytes=gets * slot if on_disk else 0,
            disk_written_bytes=puts * slot if on_disk else 0,
        ),
    )


def in_one_buffer(border: int, kind: str) -> bool:
    """Whether tensors of so many bytes that stay on a device of this kind lie in one buffer.

    They do where the C library would serve each from its heap. There they would lie amid the temporaries of
    layers, and split the memory that those leave free: by 35 MiB more where they held 18, by 48 where 37.
    """
    return kind == "cpu" and border < MMAP_THRESHOLD_BYTES


def moved_in_a_step(num_blocks: int, parts: int, two_passes: bool, course: Course = WHOLE) -> tuple[int, int]:
    """Tensors that go out and that come back in a step, away from the device."""
    order = list(border_calls(num_blocks, parts, two_passes, course))
    window, puts, gets = Window(iter(order)), 0, 0
    for is_put, place in order:
        if is_put:
            window.put(place)
            puts += 1
        else:
            missing, wanted = window.get(place)
            gets += missing + len(wanted)
    return puts, gets


class Borders(ABC):
    """Tensors [B, T, D] of one step, by place. Calls come in the order of `border_calls`."""

    def __init__(self, num_blocks: int, parts: int, two_passes: bool, kept: int = 0) -> None:
        """`kept`: rows that stay from step to step."""
        self.num_blocks, self.parts, self.two_passes, self.kept = num_blocks, parts, two_passes, kept
        self.exposed_s = 0.0  # seconds that compute waited for a tensor

    @property
    def rows(self) -> int:
        return self.num_blocks + 1 + self.kept

    def _index(self, place: Place) -> int:
        return place[0] * self.parts + place[1]

    @abstractmethod
    def begin(self, course: Course = WHOLE) -> None:
        """A step begins."""

    @abstractmethod
    def put(self, place: Place, h: Tensor) -> None:
        """Keeps `h`, which must not be changed afterwards."""

    @abstractmethod
    def get(self, place: Place) -> Tensor:
        """Returns what was last put there, on the device."""

    @abstractmethod
    def traffic(self) -> Traffic:
        """Bytes moved so far."""

    @abstractmethod
    def close(self) -> None:
        """Frees everything."""


class NearBorders(Borders):
    """All tensors stay on the device: each where it was made, or all in one buffer."""

    def __init__(self, num_blocks: int, parts: int, two_passes: bool, kept: int = 0) -> None:
        super().__init__(num_blocks, parts, two_passes, kept)
        self._there: dict[Place, Tensor] = {}
        self._buffer: _Slots | None = None  # made when the first tensor, or a wider one, is put

    def begin(self, course: Course = WHOLE) -> None:
        for place in [place for place in self._there if place[0] <= self.num_blocks]:
            del self._there[place]

    def put(self, place: Place, h: Tensor) -> None:
        if in_one_buffer(h.nbytes, h.device.type):
            if self._buffer is None or self._buffer.slot_bytes < h.nbytes:
                # The widest batch so far. What is still there keeps the memory that it has.
                self._buffer = None
                self._buffer = _Slots(h, self.rows * self.parts)
            slot = self._buffer.slot(self._index(place))
            h = slot[: h.nbytes].view(h.dtype).view(h.shape).copy_(h.detach())
        self._there[place] = h

    def get(self, place: Place) -> Tensor:
        return self._there[place]

    def traffic(self) -> Traffic:
        return Traffic()

    def close(self) -> None:
        self._there.clear()
        self._buffer = None


class AwayBorders(Borders):
    """All but a few tensors rest in host memory (`folder` None), or in a file of `folder` without a name.

    Raises StoreError if the file cannot be written or read: at a later `put`, `get` or `begin`, since the
    thread that met it works beside compute.
    """

    def __init__(
        self,
        num_blocks: int,
        parts: int,
        two_passes: bool,
        device: Device,
        folder: Path | None,
        ring: Ring | None,
        kept: int = 0,
    ) -> None:
        """`ring`: what carries them to a device of its own and from it."""
        super().__init__(num_blocks, parts, two_passes, kept)
        self._device, self._ring = device, ring
        self._thread = ThreadPoolExecutor(1, "lowmem-borders")
        self._path = None if folder is None else folder / f".borders-{secrets.token_hex(8)}.tmp"
        self._file = None if self._path is None else _open_unnamed(self._path)
        self._away: _Slots | None = None  # made when the first tensor, or a wider one, is put
        self._shapes: dict[Place, torch.Size] = {}
        self._window = Window(iter(()))
        self._at_hand: list[tuple[Place, Tensor, Future[None]]] = []  # oldest first
        self._fetched: dict[Place, Future[Tensor]] = {}
        self._traffic = Traffic()

    def begin(self, course: Course = WHOLE) -> None:
        # The last step's last tensors were never pushed out, so nobody knows yet whether they were written.
        for _, _, written in self._at_hand:
            written.result()
        self._at_hand.clear()
        self._window = Window(border_calls(self.num_blocks, self.parts, self.two_passes, course))

    def put(self, place: Place, h: Tensor) -> None:
        self._window.put(place)
        h = h.detach().contiguous()  # without its history: autograd's graph must not live on in here
        if self._away is None or self._away.slot_bytes < h.nbytes:
            wider = _Slots(h, 1 if self._file is not None else self.rows * self.parts)
            if self._away is not None:
                self._waited(self._thread.submit(self._move, self._away, wider))
            self._away = wider
        away, self._shapes[place] = self._away, h.shape
        self._traffic += Traffic(
            disk_written_bytes=away.slot_bytes if self._file is not None else 0,
        )
        self._at_hand.append((place, h, self._thread.submit(self._out, away, place, h, self._device.mark())))
        # What is pushed out must have arrived: its memory on the device is freed now.
        if len(self._at_hand) > AT_HAND:
            self._waited(self._at_hand[0][2])
            del self._at_hand[0]

    def get(self, place: Place) -> Tensor:
        missing, wanted = self._window.get(place)
        # The one that is needed now goes first; the thread takes its work in order.
        on_its_way = self._fetch(place) if missing else self._fetched.pop(place, None)
        self._fetched.update({other: self._fetch(other) for other in wanted})
        if on_its_way is None:
            return next(h for other, h, _ in reversed(self._at_hand) if other == place)
        return self._waited(on_its_way)

    def traffic(self) -> Traffic:
        return self._traffic

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._at_hand.clear()
        self._fetched.clear()
        self._away = None
        if self._file is not None and self._path is not None:
            self._file.close()
            if sys.platform == "win32":
                with contextlib.suppress(OSError):
                    self._path.unlink()

    def _fetch(self, place: Place) -> Future[Tensor]:
        away = self._away
        assert away is not None, "a step begins with a put"
        # Made here and not on the thread: its memory belongs to the CUDA stream that computes.
        target = torch.empty(self._shapes[place], dtype=away.dtype, device=self._device.torch)
        self._traffic += Traffic(
            disk_read_bytes=away.slot_bytes if self._file is not None else 0,
        )
        return self._thread.submit(self._in, away, place, target, self._device.mark())

    def _waited(self, future: Future[T]) -> T:
        start = time.perf_counter()
        result = future.result()
        self.exposed_s += time.perf_counter() - start
        return result

    # --------------------------------------------------------------------------------------------------------
    # On the thread: one call after another, so the file needs only one slot

    def _out(self, away: _Slots, place: Place, h: Tensor, made: Mark) -> None:
        index, flat = self._index(place), h.flatten().view(torch.uint8)
        slot = away.slot(index)
        self._device.wait(made)
        if self._ring is None:
            slot[: len(flat)].copy_(flat)
        else:
            for part in self._ring.parts(len(flat)):
                with self._ring.from_device(flat[part], urgent=True) as chunk:
                    slot.numpy()[part] = chunk.numpy()
        if self._file is not None and self._path is not None:
            with refusals_of(self._path, StoreError):
                self._file.seek(index * away.slot_bytes)
                self._check(self._file.write(slot.numpy().data), away)

    def _in(self, away: _Slots, place: Place, target: Tensor, freed: Mark) -> Tensor:
        index, flat = self._index(place), target.flatten().view(torch.uint8)
        slot = away.slot(index)
        if self._file is not None and self._path is not None:
            with refusals_of(self._path, StoreError):
                self._file.seek(index * away.slot_bytes)
                self._check(self._file.readinto(slot.numpy().data), away)
        self._device.wait(freed)  # compute has used what lay in the target's memory before
        if self._ring is None:
            flat.copy_(slot[: len(flat)])
        else:
            for part in self._ring.parts(len(flat)):
                with self._ring.to_device(flat[part], urgent=True) as chunk:
                    chunk.numpy()[:] = slot.numpy()[part]
        return target

    def _move(self, old: _Slots, wider: _Slots) -> None:
        """Takes what lies in the old slots to wider ones, the last first: they overlap in the file."""
        for index in reversed(range(self.rows * self.parts)):
            source, target = old.slot(index), wider.slot(index)
            if self._file is not None and self._path is not None:
                with refusals_of(self._path, StoreError):
                    self._file.seek(index * old.slot_bytes)
                    moved = self._file.readinto(source.numpy().data)
                    if not moved:
                        continue  # the file ends before it
                    self._check(moved, old)
                    target[: old.slot_bytes].copy_(source)
                    self._file.seek(index * wider.slot_bytes)
                    self._check(self._file.write(target.numpy().data), wider)
            else:
                target[: old.slot_bytes].copy_(source)

    def _check(self, moved: int, away: _Slots) -> None:
        """Raises StoreError unless all of a slot was moved: the system may move less, without an error."""
        if moved != away.slot_bytes:
            raise StoreError(
                f"{self._path}: moved {moved} of {away.slot_bytes} bytes of an activation; "
                "the disk is full or failing; free space, then run again"
            )


class _Slots:
    """Host memory for tensors no larger than `h`: a slot for every place, or one on the way to the file."""

    def __init__(self, h: Tensor, count: int) -> None:
        self.dtype = h.dtype
        self.slot_bytes = round_up(h.nbytes, PAGE)
        self._count, self._bytes = count, aligned_buffer(count * self.slot_bytes)

    def slot(self, index: int) -> Tensor:
        start = index % self._count * self.slot_bytes
        return self._bytes[start : start + self.slot_bytes]


def _open_unnamed(path: Path) -> io.FileIO:
    """Opens a file that is gone when the process ends, however it ends; unbuffered where possible.

    Windows lets no open file go: there it is gone when it is closed, and a kill leaves it behind. Raises
    StoreError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    with refusals_of(path, StoreError):
        try:
            file = open_regular(path, flags | getattr(os, "O_DIRECT", 0), 0o600)
        except OSError as problem:
            if problem.errno not in REFUSED_DIRECT:
                raise
            with contextlib.suppress(FileNotFoundError):  # a refusal may leave the file that it made
                path.unlink()
            file = open_regular(path, flags, 0o600)
        try:
            path.unlink()
        except PermissionError:
            if sys.platform != "win32":
                os.close(file)
                raise
        except OSError:
            os.close(file)
            raise
    return io.FileIO(file, "r+b")
