"""How much a run moved, and how long that took: over the link to the device, and to and from the disk.

Both are plain values with `+`, so that a step, a process and a whole run are sums of the same kind.
"""

from __future__ import annotations

from lowmem.schema import Section


class Traffic(Section):
    """Bytes each way. Nothing crosses the link where device and host are one memory."""

    host_to_device_bytes: int = 0
    device_to_host_bytes: int = 0
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0
    exchanged_bytes: int = 0  # that ranks have sent to each other

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(**{name: value + getattr(other, name) for name, value in self})

    def __mul__(self, count: int) -> Traffic:
        return Traffic(**{name: value * count for name, value in self})


class TransferTimes(Section):
    """Seconds that traffic took each way, whether or not compute waited for it."""

    host_to_device_s: float = 0.0
    device_to_host_s: float = 0.0
    disk_read_s: float = 0.0
    disk_written_s: float = 0.0

    def __add__(self, other: TransferTimes) -> TransferTimes:
        return TransferTimes(**{name: value + getattr(other, name) for name, value in self})
