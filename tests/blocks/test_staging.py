"""The ring's chunks and page-locking, on a device that refuses it when told to; pacing; slots."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.blocks import staging
from lowmem.blocks.arena import aligned_buffer
from lowmem.blocks.staging import (
    CHUNK_BYTES,
    PIECES_BEGUN,
    RING_CHUNKS,
    Lane,
    Pace,
    Ring,
    SlotPool,
    pieces_of,
    ring_bytes,
)
from lowmem.blocks.traffic import Traffic
from lowmem.machine.device import CPU, Device, Mark, Way
from lowmem.units import MIB

CHUNK = 4096


class Locking(Device):
    """A CPU that page-locks as many buffers as it `accepts`."""

    def __init__(self, accepts: int) -> None:
        super().__init__()
        self.accepts, self.tried = accepts, list[int]()

    def locked(self, num_bytes: int) -> Tensor | None:
        self.tried.append(num_bytes)
        return aligned_buffer(num_bytes) if len(self.tried) <= self.accepts else None


def locked_ring(allowed_chunks: float, accepts: int) -> tuple[Ring, list[int]]:
    """A ring that may lock so many chunks, on a machine that accepts so many; and what it tried to lock."""
    device = Locking(accepts)
    return Ring(device, CHUNK, int(allowed_chunks * CHUNK)), device.tried


def round_trip(ring: Ring) -> bool:
    for seed in range(2 * RING_CHUNKS):
        sent = torch.randint(
            0, 256, (CHUNK - 512 * seed,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        arrived = torch.zeros_like(sent)
        with ring.to_device(arrived) as chunk:
            chunk.copy_(sent)
        with ring.from_device(arrived) as chunk:
            if not torch.equal(chunk, sent):
                return False
    return True


@pytest.mark.parametrize(
    ("allowed", "accepted", "locked", "chunks"),
    [
        (RING_CHUNKS, 99, RING_CHUNKS, RING_CHUNKS),
        (99, 99, RING_CHUNKS, RING_CHUNKS),  # never more than the plan counts
        (RING_CHUNKS - 0.5, 99, RING_CHUNKS - 1, RING_CHUNKS - 1),  # a smaller limit: a smaller ring
        (RING_CHUNKS, 2, 2, 2),  # refused half-way: a smaller ring
        (RING_CHUNKS, 1, 1, RING_CHUNKS),  # too small to be one: pageable
        (RING_CHUNKS, 0, 0, RING_CHUNKS),
        (0, 99, 0, RING_CHUNKS),
    ],
)
def test_a_ring_locks_what_it_may_and_is_pageable_where_it_may_not(
    allowed: float, accepted: int, locked: int, chunks: int
) -> None:
    ring, tried = locked_ring(allowed, accepted)
    assert ring.facts() == {"chunk_bytes": CHUNK, "chunks": chunks, "locked_bytes": locked * CHUNK}
    assert tried == [CHUNK] * len(tried)
    assert round_trip(ring)
    assert len(tried) == min(int(allowed), RING_CHUNKS, accepted + 1), "locked once"
    assert ring.num_chunks * ring.chunk_bytes <= ring_bytes(CHUNK), "the plan's bytes"


def test_a_closed_ring_holds_no_chunk() -> None:
    ring, _ = locked_ring(RING_CHUNKS, RING_CHUNKS)
    kept = weakref.ref(next(iter(ring._chunks._free.queue))[0]) if round_trip(ring) else None
    ring.close()
    assert kept is not None and kept() is None


def test_a_ring_is_small_whatever_a_block_weighs() -> None:
    assert ring_bytes(100 * CHUNK_BYTES) == ring_bytes(CHUNK_BYTES) <= 512 * MIB
    assert ring_bytes(4096) == RING_CHUNKS * 4096


def test_what_passed_a_ring_is_counted_each_way() -> None:
    ring, _ = locked_ring(0, 0)
    there = torch.ones(1000, dtype=torch.uint8)
    with ring.to_device(there) as chunk:
        chunk.zero_()
    assert there.sum() == 0
    for _ in range(2):
        with ring.from_device(there):
            pass
    assert ring.traffic() == Traffic(host_to_device_bytes=1000, device_to_host_bytes=2000)
    copied = ring.transfer_s()
    assert copied.host_to_device_s > 0 and copied.device_to_host_s > 0


def test_a_chunk_that_failed_to_be_filled_goes_back_and_is_not_copied() -> None:
    ring, _ = locked_ring(0, 0)
    there = torch.ones(10, dtype=torch.uint8)
    for _ in range(2 * RING_CHUNKS):
        with pytest.raises(OSError, match="disk"), ring.to_device(there) as chunk:
            chunk.zero_()
            raise OSError("disk")
    assert there.sum() == 10 and ring.traffic() == Traffic()
    assert round_trip(ring)


def test_a_chunk_belongs_to_one_thread_at_a_time() -> None:
    ring, _ = locked_ring(0, 0)
    wrong = []

    def work(mark: int) -> None:
        there = torch.zeros(CHUNK, dtype=torch.uint8)
        for _ in range(100):
            with ring.to_device(there) as chunk:
                chunk.fill_(mark)
                time.sleep(0)
            with ring.from_device(there) as chunk:
                time.sleep(0)
                wrong.extend([mark] * int((chunk != mark).any()))

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 2 * RING_CHUNKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_copies_are_cut_into_pieces_that_carry_every_byte_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PIECE_BYTES", 100)
    sources = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in (30, 0, 250, 20, 100, 1)]
    pairs = [(torch.zeros_like(source), source) for source in sources]
    pieces = list(pieces_of(pairs))
    assert [sum(len(source) for _, source in piece) for piece in pieces] == [100, 100, 100, 100, 1]
    for target, source in (pair for piece in pieces for pair in piece):
        target.add_(source)
    assert all(torch.equal(target, source) for target, source in pairs)


class Held(Way):
    """Nothing is done before `go`."""

    def __init__(self) -> None:
        self.begun, self.go = list[int](), threading.Event()

    def begin(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        self.begun.append(int(pairs[0][1][0]))
        return super().begin(pairs)

    def finish(self, begun: Any) -> float:
        self.go.wait()
        return super().finish(begun)


@pytest.mark.parametrize("blocks", [1, 2])
def test_an_urgent_copy_waits_for_the_pieces_that_are_begun_and_for_no_other(
    monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    """However many threads copy blocks meanwhile, and although it has two pieces itself."""
    monkeypatch.setattr(staging, "PIECE_BYTES", 10)
    way = Held()
    lane, block, urgent = Lane(way), torch.full((80,), 1), torch.full((20,), 2)
    with ThreadPoolExecutor(blocks + 1) as threads:
        for _ in range(blocks):
            threads.submit(lane.copy, [(torch.zeros_like(block), block)], False)
        while len(way.begun) < PIECES_BEGUN:
            time.sleep(1e-3)
        threads.submit(lane.copy, [(torch.zeros_like(urgent), urgent)], True)
        while not lane._urgent:
            time.sleep(1e-3)
        way.go.set()
    assert way.begun[: PIECES_BEGUN + 2] == [1] * PIECES_BEGUN + [2, 2]
    assert len(way.begun) == 8 * blocks + 2


def test_a_copy_that_fails_gives_its_turn_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PIECE_BYTES", 10)
    lane, half = Lane(Way()), torch.zeros(20, dtype=torch.uint8)
    for _ in range(2 * PIECES_BEGUN):
        with pytest.raises(RuntimeError):
            lane.copy([(torch.zeros(5, dtype=torch.uint8), half)], True)
    assert lane.copy([(torch.ones_like(half), half)], False) >= 0


def test_a_pace_is_one_for_all_threads() -> None:
    pace, started = Pace(1000.0), time.perf_counter()

    def move() -> None:
        with pace(30):
            pass

    threads = [threading.Thread(target=move) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.perf_counter() - started >= 4 * 0.03


def test_a_paced_ring_takes_at_least_the_links_time() -> None:
    ring = Ring(CPU, CHUNK, paces=(Pace(10.0 * CHUNK), Pace(20.0 * CHUNK)))
    there, started = torch.zeros(CHUNK, dtype=torch.uint8), time.perf_counter()
    with ring.to_device(there):
        pass
    assert time.perf_counter() - started >= 0.1
    with ring.from_device(there):
        pass
    assert time.perf_counter() - started >= 0.15


def test_a_slot_pool_makes_a_buffer_only_when_none_is_free_and_waits_at_its_size() -> None:
    made: list[Tensor] = []
    pool = SlotPool(2, lambda: made.append(torch.zeros(1)) or made[-1], CPU)  # type: ignore[func-returns-value]
    first = pool.take()
    assert len(made) == 1
    second = pool.take()
    waiting = threading.Thread(target=pool.take)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    pool.give(first)
    waiting.join(5)
    assert not waiting.is_alive()
    assert len(made) == 2 and second is made[1]


def test_who_takes_a_slot_waits_for_what_still_uses_it() -> None:
    waited: list[Mark] = []

    class Late(Device):
        def wait(self, mark: Mark) -> None:
            waited.append(mark)

    pool = SlotPool(1, lambda: torch.zeros(1), Late())
    slot = pool.take()
    pool.give(slot, "used")
    assert waited == [], "who gives it does not wait"
    assert pool.take() is slot and waited == ["used"]
