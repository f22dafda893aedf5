"""Moves blocks, units and borders on the simulated card, as they are and with a fault planted.

    python order_child.py SEEDS_AS_IT_IS SEEDS_WITH_A_FAULT

Prints one line of JSON: for each fault, in how many seeds the order of accesses was wrong. Kernels are short,
so bytes would be right by luck: only the order tells. It also tells after how many pieces of a block, each
way, a border was copied that came when a block of eight pieces had begun.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from unittest import mock

import simcuda  # before torch
import torch
from happens_before import RACES, raw_result
from simcuda import WORLD, Card

from lowmem.blocks import borders as borders_module
from lowmem.blocks import staging, store, stream, unit_stream
from lowmem.blocks import unit as unit_module
from lowmem.blocks.arena import GROUP_SIZE, ArenaLayout, aligned_buffer
from lowmem.blocks.borders import AwayBorders
from lowmem.blocks.optim import Step
from lowmem.blocks.order import border_calls
from lowmem.blocks.run_dir import RunDir, block_key
from lowmem.blocks.staging import Ring
from lowmem.blocks.store import DiskStore, HostStore
from lowmem.blocks.stream import BlockStream
from lowmem.blocks.sweep_stream import SweepStream
from lowmem.blocks.unit import Unit
from lowmem.blocks.unit_stream import UnitStream, Update
from lowmem.machine.device import CardWay, Cuda
from lowmem.recipe import OptimizerConfig

BLOCKS = 3
LAYOUTS = [
    ArenaLayout([(f"layer{2 * block + half}.w", (64, 48)) for half in (0, 1)], "adamw")
    for block in range(BLOCKS)
]
SHARED = ArenaLayout([("t", (10, 8))], "adamw")
KEYS = {**{block_key(block): layout for block, layout in enumerate(LAYOUTS)}, "shared": SHARED}
SLOT = max(layout.total_bytes for layout in LAYOUTS)
UNITS = 2 * BLOCKS


@contextlib.contextmanager
def opened_store(in_ram: bool) -> Iterator[tuple[Any, Cuda]]:
    with tempfile.TemporaryDirectory() as folder:
        first = DiskStore(RunDir(folder), KEYS, {})
        for key, layout in KEYS.items():
            first.write(key, aligned_buffer(layout.total_bytes), 0)
        first.close()
        device = Cuda()
        disk = DiskStore(RunDir(folder), KEYS, first.files, Ring(device, SLOT, 4 * SLOT))
        yield HostStore(disk, 2 * SLOT) if in_ram else disk, device


def blocks(in_ram: bool) -> None:
    """Independent blocks: each trained by kernels, written beside the next; then read only."""
    with opened_store(in_ram) as (kept, device):
        moving = BlockStream(kept, LAYOUTS, SHARED, device, False, True)
        shared = moving.load_shared()
        try:
            for visit in range(2 * BLOCKS):
                block = visit % BLOCKS
                buffer = moving.load(block)
                moving.prefetch((block + 1) % BLOCKS)
                for _ in range(3):
                    buffer.add_(1)
                shared.add_(1)
                moving.store({block: buffer}, shared, visit + 1, lambda files: None, False)
            for block in range(BLOCKS):
                buffer = moving.load(block)
                buffer.add_(0)
                moving.release(block, buffer)
            moving.finish()
        finally:
            moving.close()


def residents() -> None:
    """Blocks that all stay, in memory that kernels have just freed."""
    with opened_store(False) as (kept, device):
        moving = BlockStream(kept, LAYOUTS, SHARED, device, True, True)
        try:
            for block in range(BLOCKS):
                torch.ones(4096, device="cuda").add_(1)
                moving.load(block).add_(1)
        finally:
            moving.close()


def units(in_ram: bool, stay: frozenset[int] = frozenset(), in_place: bool = False) -> None:
    """Three exact steps, unit by unit; the last ends a visit."""
    with opened_store(in_ram) as (kept, device):
        every = [
            Unit(block_key(index // 2), LAYOUTS[index // 2], {f"layer{index}.w"}, "cuda")
            for index in range(UNITS)
        ]
        moving = UnitStream(kept, every, device, stay, True, in_place=in_place)
        grads = torch.zeros(max(unit.numel for unit in every) + GROUP_SIZE, device="cuda")
        shared = torch.zeros(SHARED.total_bytes, dtype=torch.uint8, device="cuda")
        norm = torch.zeros((), device="cuda")
        try:
            for number, durable in ((1, False), (2, False), (3, True)):
                for index in range(UNITS - 1):
                    use(moving, index, index + 1)
                for index in reversed(range(UNITS)):
                    use(moving, index, index - 1, update_follows=True)
                    grads.add_(1)
                    step = Step(number, 1e-3, OptimizerConfig())
                    unit = every[index]

                    def given(rows: slice, unit: Unit = unit) -> torch.Tensor:
                        first = unit.place(rows.start)
                        return grads[first : first + rows.stop - rows.start]

                    moving.update(Update(index, given, step, 1, durable, norm, lambda: None))
            moving.finish()
            for write in moving.take_written().values():
                write.result()
        finally:
            moving.close()
            kept.close()
        del shared


def sweeps(in_ram: bool, stay: frozenset[int] = frozenset()) -> None:
    """Two sweeps of two steps, block by block; the second ends a visit."""
    with opened_store(in_ram) as (kept, device):
        moving = SweepStream(kept, LAYOUTS, device, stay, True)
        last = BLOCKS - 1
        try:
            for durable in (False, True):
                for block in range(last):
                    weights = moving.load(block, whole=False)
                    moving.prefetch(block + 1, whole=block + 1 == last)
                    for _ in range(2):
                        weights[: LAYOUTS[block].weights_bytes].float().sum()
                    moving.release(block)
                for block in range(last, -1, -1):
                    buffer = moving.load(block, whole=True)
                    if block:
                        moving.prefetch(block - 1, whole=True)
                    for _ in range(2):
                        buffer.add_(1)
                    moving.keep(block, 1, durable)
            for write in moving.take_written().values():
                write.result()
        finally:
            moving.close()
            kept.close()


def use(moving: UnitStream, index: int, following: int, update_follows: bool = False) -> None:
    weights = moving.load(index)
    if 0 <= following < UNITS:
        moving.prefetch(following)
    for piece in weights:
        (piece.float() + 1).sum()
    moving.advance()
    moving.release(index, update_follows)


def borders(on_disk: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        device = Cuda()
        ring = Ring(device, 4096, 4 * 4096)
        away = AwayBorders(5, 2, False, device, Path(folder) if on_disk else None, ring)
        try:
            for _ in range(2):
                away.begin()
                for is_put, place in border_calls(5, 2, False):
                    if is_put:
                        h = torch.ones(2, 3, 500, device="cuda")
                        h.add_(1)
                        away.put(place, h)
                        del h
                    else:
                        away.get(place).add(1)
        finally:
            away.close()


def callbacks_after_the_end(in_ram: bool) -> None:
    """Units in place, whose writes end before anything asks to be called then."""
    call_then = Future.add_done_callback

    def late(self: Future[Any], call: Callable[[Future[Any]], object]) -> None:
        wait([self])
        call_then(self, call)

    with mock.patch.object(Future, "add_done_callback", late):
        units(in_ram, in_place=True)


SCENARIOS: dict[str, Callable[[], None]] = {
    "blocks, disk": lambda: blocks(False),
    "blocks, ram": lambda: blocks(True),
    "residents": residents,
    "units, disk": lambda: units(False),
    "units, ram": lambda: units(True),
    "units, some stay": lambda: units(False, frozenset({0, 3})),
    "units in place, disk": lambda: units(False, in_place=True),
    "units in place, ram": lambda: units(True, in_place=True),
    "units in place, writes end early": lambda: callbacks_after_the_end(True),
    "units in place, some stay": lambda: units(False, frozenset({0, 3}), in_place=True),
    "sweeps, disk": lambda: sweeps(False),
    "sweeps, ram": lambda: sweeps(True),
    "sweeps, some stay": lambda: sweeps(False, frozenset({0})),
    "borders, ram": lambda: borders(False),
    "borders, disk": lambda: borders(True),
}

# ------------------------------------------------------------------------------------------------------------
# Faults


def nothing(*_: Any, **__: Any) -> None:
    """In the place of a wait."""


def finish_without_wait(self: CardWay, begun: Any) -> float:
    return 0.0


def unwaited(self: Any, future: Any) -> Any:
    return raw_result(future)


def give_without_mark(self: Any, slot: Any, mark: Any = None) -> None:
    self._free.put((slot, None))


def wait_in(thread: str) -> Callable[..., None]:
    """Only threads of another name wait."""
    wait = Cuda.wait

    def waits(self: Cuda, mark: Any) -> None:
        if not threading.current_thread().name.startswith(thread):
            wait(self, mark)

    return waits


def unfinished(self: UnitStream, unit: int) -> None:
    """`load` reads what an update may still be writing."""


def given_at_once(self: UnitStream, unit: int, slot: torch.Tensor, write: Any) -> None:
    """A slot is free before its weights are written."""
    self._slots.give(slot, self.device.mark())


FAULTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "block handed on before its copy's mark": (
        "blocks, disk",
        lambda: mock.patch.object(CardWay, "finish", finish_without_wait),
    ),
    "border copied without compute's mark": (
        "borders, ram",
        lambda: mock.patch.object(Cuda, "wait", wait_in("lowmem-borders")),
    ),
    "border not waited for": ("borders, ram", lambda: mock.patch.object(AwayBorders, "_waited", unwaited)),
    "slot freed too early": (
        "units, ram",
        lambda: mock.patch.object(staging.SlotPool, "give", give_without_mark),
    ),
    "no wait before a block is written": (
        "blocks, ram",
        lambda: mock.patch.object(Cuda, "wait_for_compute", nothing),
    ),
    "no wait before rows are written": (
        "units, disk",
        lambda: mock.patch.object(Cuda, "wait", wait_in("lowmem-rows")),
    ),
    "updated weights given back before they are written": (
        "units in place, ram",
        lambda: mock.patch.object(UnitStream, "_keep", given_at_once),
    ),
    "no wait before updated weights are written": (
        "units in place, disk",
        lambda: mock.patch.object(Cuda, "wait", wait_in("lowmem-rows")),
    ),
    "weights of a sweep given back too early": (
        "sweeps, ram",
        lambda: mock.patch.object(staging.SlotPool, "give", give_without_mark),
    ),
    "no wait before a swept block is written": (
        "sweeps, disk",
        lambda: mock.patch.object(Cuda, "wait", wait_in("lowmem-sweep-writer")),
    ),
    "chunk used again while its copy reads it": (
        "units, disk",
        lambda: mock.patch.object(CardWay, "finish", finish_without_wait),
    ),
    "resident block read into memory in use": (
        "residents",
        lambda: mock.patch.object(Cuda, "wait_for_compute", nothing),
    ),
}


def pieces_before_a_border() -> list[int]:
    """Each way: pieces of a block on the copy stream before a border's copy, of which the block has eight.

    The card is held up until the border's copy is asked for.
    """
    found = []
    for way in (staging.IN, staging.OUT):
        device, begun, held, came = Cuda(), list[str](), threading.Event(), threading.Event()
        begin, finish = CardWay.begin, CardWay.finish

        def logged(
            self: CardWay, pairs: Any, begin: Any = begin, begun: Any = begun, came: Any = came
        ) -> Any:
            begun.append(threading.current_thread().name)
            if len(begun) == staging.PIECES_BEGUN:
                came.set()
            return begin(self, pairs)

        def late(self: CardWay, copies: Any, finish: Any = finish, held: Any = held) -> float:
            held.wait()
            return finish(self, copies)  # type: ignore[no-any-return]

        with mock.patch.multiple(CardWay, begin=logged, finish=late):
            ring = Ring(device, staging.CHUNK_BYTES, 4 * staging.CHUNK_BYTES)
            host, there = device.locked(8 * staging.PIECE_BYTES), device.buffer(8 * staging.PIECE_BYTES)
            assert host is not None
            pair = (there, host) if way == staging.IN else (host, there)
            border = device.buffer(1000)
            with ThreadPoolExecutor(1, "block") as of_block, ThreadPoolExecutor(1, "border") as of_border:
                done = [of_block.submit(ring.copy, [pair], way)]
                came.wait()
                done.append(of_border.submit(copied_as_a_border, ring, border, way))
                while not ring._lanes[way]._urgent:
                    time.sleep(1e-3)
                held.set()
                for each in done:
                    each.result()
        place = next(index for index, name in enumerate(begun) if name.startswith("border"))
        assert len(begun) == 9, begun
        found.append(place)
    return found


def copied_as_a_border(ring: Ring, border: torch.Tensor, way: int) -> None:
    passing = ring.to_device if way == staging.IN else ring.from_device
    with passing(border, urgent=True) as chunk:
        if way == staging.IN:
            chunk.numpy()[:] = 1


def wrong(scenario: Callable[[], None], seed: int) -> list[str]:
    RACES.clear()
    WORLD.late = random.Random(seed)
    sys.setswitchinterval(random.Random(seed).choice([1e-5, 1e-4, 5e-3]))
    with Card():
        scenario()
    return list(RACES)


def races_of(scenario: Callable[[], None], seeds: int) -> list[str]:
    return [race for seed in range(seeds) for race in wrong(scenario, seed)][:3]


def seeds_that_find(fault: str, seeds: int) -> int:
    name, planted = FAULTS[fault]
    count = 0
    for seed in range(seeds):
        with planted():
            count += bool(wrong(SCENARIOS[name], seed))
    return count


def apart(call: Callable[[], Any]) -> Any:
    """What a call returns in a process of its own: clocks grow with every thread there ever was."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, json.dumps(call()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    return json.loads(content)


def main() -> None:
    simcuda.install()
    for module in (staging, store):
        module.CHUNK_BYTES = 8192  # type: ignore[attr-defined]
    staging.PIECE_BYTES = 4096
    unit_module.CHUNK_NUMEL["cuda"] = 4 * GROUP_SIZE
    as_it_is, with_a_fault = int(sys.argv[1]), int(sys.argv[2])
    found: dict[str, Any] = {"clean": {}, "faults": {}}
    wrong(SCENARIOS["units, disk"], 0)  # here once, and not in every process: what an update imports
    for name, scenario in SCENARIOS.items():
        found["clean"][name] = apart(lambda scenario=scenario: races_of(scenario, as_it_is))
    for fault in FAULTS:
        found["faults"][fault] = apart(lambda fault=fault: seeds_that_find(fault, with_a_fault))
    with Card():
        found["pieces_before_a_border"] = pieces_before_a_border()
    print(json.dumps(found), flush=True)
    os._exit(0)  # the simulated card must not be torn down in any order


assert stream and unit_stream and borders_module

if __name__ == "__main__":
    main()
