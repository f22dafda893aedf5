"""Makes the C library give freed memory back to the system, so that a run's peak is what its tensors take.

glibc serves a request above a threshold from a map of its own, which goes back to the system when it is
freed. But each such free raises the threshold, up to 32 MiB, and from then on freed activations stay in the
heap: up to a tenth of a GiB of them. A threshold that is set stays where it is, and the plan can predict the
peak. Other C libraries and systems are left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

from lowmem.units import MIB

# Smaller requests come from the heap. A lower threshold would cost more time in page faults than it saves
# memory.
MMAP_THRESHOLD_BYTES = 1 * MIB
GAPS = 0.33  # of what lies in the heap at its peak: freed memory between what is in use, as measured
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def give_back_freed() -> bool:
    """Sets the threshold for the rest of this process. Returns whether the C library took it."""
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        return bool(
            mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
            and mallopt(M_TRIM_THRESHOLD, MMAP_THRESHOLD_BYTES)
        )
    return False
