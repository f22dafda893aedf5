"""The C library's heap, told to give back what is freed: then a run's peak is what its tensors take, and the
plan can predict it.

glibc serves requests above a threshold from maps of their own, which go back to the system when freed, and
raises that threshold to 32 MiB as such maps are freed: from then on freed activations stay in its heap, up to
a tenth of a GiB of them. Setting the threshold fixes it. Other C libraries and systems are left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

from lowmem.units import MIB

MMAP_THRESHOLD_BYTES = (
    1 * MIB
)  # smaller requests come from the heap; a lower threshold costs steps far more in page faults than it saves
GAPS = 0.33  # of what lies in the heap at its peak: the gaps between, measured
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def give_back_freed() -> bool:
    """Whether the heap could be told. For the whole process, from here on."""
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):  # no mallopt: another C library
        mallopt = ctypes.CDLL(None).mallopt
        return bool(
            mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
            and mallopt(M_TRIM_THRESHOLD, MMAP_THRESHOLD_BYTES)
        )
    return False
