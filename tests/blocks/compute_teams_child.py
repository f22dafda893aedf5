"""Prints how many threads a stream adds to a process beside its own: the argument is the run folder.

A process of its own, because a team of OpenMP threads that some other test has started would hide them.
"""

from __future__ import annotations

import os
import sys
import threading

import torch

from lowmem.blocks.arena import ArenaLayout, aligned_buffer
from lowmem.blocks.run_dir import RunDir
from lowmem.blocks.store import DiskStore, HostStore
from lowmem.blocks.stream import BlockStream, block_key

BLOCKS = [ArenaLayout([("weight", (1024, 2048))], "adamw") for _ in range(3)]
SHARED = ArenaLayout([("table", (1024, 1024))], "adamw")
LAYOUTS = {**{block_key(b): layout for b, layout in enumerate(BLOCKS)}, "shared": SHARED}


def threads_not_of_python() -> int:
    return len(os.listdir("/proc/self/task")) - len(threading.enumerate())


def main() -> None:
    torch.set_num_threads(4)
    torch.ones(1 << 20).add_(1)  # starts the main thread's team
    run = RunDir(sys.argv[1])
    first = DiskStore(run, LAYOUTS, {})
    for block, layout in enumerate(BLOCKS):
        first.write(block_key(block), aligned_buffer(layout.total_bytes), 0)
    # Not closed before the count: a thread that ends is gone from Python's list before it is gone.
    store = HostStore(DiskStore(run, LAYOUTS, first.files))
    stream = BlockStream(store, BLOCKS, SHARED, torch.device("cpu"), False, True)
    before = threads_not_of_python()
    shared = torch.zeros(SHARED.total_bytes, dtype=torch.uint8)
    for visit, block in enumerate([0, 1, 2, 0, 1, 2]):
        buffer = stream.load(block)
        stream.prefetch((block + 1) % len(BLOCKS))
        stream.store({block: buffer}, shared, visit + 1, lambda files: None, wait=False)
    stream.finish()
    print(threads_not_of_python() - before)
    stream.close()
    first.close()


if __name__ == "__main__":
    main()
