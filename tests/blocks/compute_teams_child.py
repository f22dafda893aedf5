"""Prints how many threads the streams of blocks and of units add to a process beside its own.

The argument is the run folder.
A process of its own, because a team of OpenMP threads that some other test has started would hide them.
"""

from __future__ import annotations

import os
import sys
import threading

import torch

from lowmem.blocks.arena import ArenaLayout, aligned_buffer
from lowmem.blocks.optim import Step
from lowmem.blocks.run_dir import RunDir, block_key
from lowmem.blocks.store import DiskStore, HostStore
from lowmem.blocks.stream import BlockStream
from lowmem.blocks.unit import Unit
from lowmem.blocks.unit_stream import UnitStream, Update
from lowmem.machine.device import CPU
from lowmem.recipe import OptimizerConfig

BLOCKS = [ArenaLayout([("weight", (1024, 2048))], "adamw") for _ in range(3)]
SHARED = ArenaLayout([("table", (1024, 1024))], "adamw")
LAYOUTS = {**{block_key(b): layout for b, layout in enumerate(BLOCKS)}, "shared": SHARED}


def threads_not_of_python() -> int:
    return len(os.listdir("/proc/self/task")) - len(threading.enumerate())


def train_units(stream: UnitStream, first_visit: int) -> None:
    """Three steps, each of which ends a visit."""
    grads = torch.ones(max(layout.numel for layout in BLOCKS))
    for step in range(1, 4):
        for unit in reversed(range(len(BLOCKS))):
            stream.load(unit)
            stream.prefetch(unit - 1 if unit else len(BLOCKS) - 1)
            the_step = Step(step, 1e-3, OptimizerConfig())
            given = lambda rows: grads[: rows.stop - rows.start]  # noqa: E731
            stream.update(
                Update(unit, given, the_step, first_visit + step, True, torch.zeros(()), lambda: None)
            )
            stream.release(unit)
        stream.finish()
        for file in stream.take_written().values():
            file.result()


def main() -> None:
    torch.set_num_threads(4)
    torch.ones(1 << 20).add_(1)  # starts the main thread's team
    run = RunDir(sys.argv[1])
    first = DiskStore(run, LAYOUTS, {})
    for block, layout in enumerate(BLOCKS):
        first.write(block_key(block), aligned_buffer(layout.total_bytes), 0)
    # Not closed before the count: a thread that ends is gone from Python's list before it is gone.
    store = HostStore(DiskStore(run, LAYOUTS, first.files))
    stream = BlockStream(store, BLOCKS, SHARED, CPU, False, True)
    before = threads_not_of_python()
    shared = torch.zeros(SHARED.total_bytes, dtype=torch.uint8)
    for visit, block in enumerate([0, 1, 2, 0, 1, 2]):
        buffer = stream.load(block)
        stream.prefetch((block + 1) % len(BLOCKS))
        stream.store({block: buffer}, shared, visit + 1, lambda files: None, wait=False)
    stream.finish()
    units = [Unit(block_key(block), layout, {"weight"}) for block, layout in enumerate(BLOCKS)]
    on_disk = DiskStore(run, LAYOUTS, store.files)
    streams = [UnitStream(each, units, CPU, frozenset({0}), True) for each in (store, on_disk)]
    for number, unit_stream in enumerate(streams, start=1):
        train_units(unit_stream, 100 * number)
    print(threads_not_of_python() - before)
    for unit_stream in streams:
        unit_stream.close()
    on_disk.close()
    stream.close()
    first.close()


if __name__ == "__main__":
    main()
