"""Tries how much host memory CUDA page-locks here, as a process of its own: a refusal can spoil the process
that meets it.

    python -m lowmem.blocks.lock_probe WANTED_BYTES CHUNK_BYTES

After each chunk it prints the bytes locked so far, so the last line counts however the process ends.
"""

from __future__ import annotations

import sys

from lowmem.blocks.arena import aligned_buffer
from lowmem.blocks.staging import lock_pages


def main() -> None:
    wanted_bytes, chunk_bytes = map(int, sys.argv[1:3])
    locked = []
    for _ in range(wanted_bytes // chunk_bytes):
        locked.append(aligned_buffer(chunk_bytes))
        if not lock_pages(locked[-1]):
            break
        print(len(locked) * chunk_bytes, flush=True)


if __name__ == "__main__":
    main()
