"""Counts what was moved between disk, host and device, and how long it took.

Each way has its own figure. Figures of parts, of steps and of processes add up. Nothing crosses a link where
device and host are one memory.
"""

from __future__ import annotations

from lowmem.schema import Section


class Traffic(Section):
    """Bytes moved, by way."""

    host_to_device_bytes: int = 0
    device_to_host_bytes: int = 0
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(**{way: num_bytes + getattr(other, way) for way, num_bytes in self})

    def __mul__(self, count: int) -> Traffic:
        return Traffic(**{way: num_bytes * count for way, num_bytes in self})


class TransferTimes(Section):
    """Seconds that the traffic took, by way, whether compute ran beside it or not."""

    host_to_device_s: float = 0.0
    device_to_host_s: float = 0.0
    disk_read_s: float = 0.0
    disk_written_s: float = 0.0

    def __add__(self, other: TransferTimes) -> TransferTimes:
        return TransferTimes(**{way: seconds + getattr(other, way) for way, seconds in self})
