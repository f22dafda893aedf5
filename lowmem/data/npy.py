"""Reads the header of an array in NumPy's format (.npy) in bounded memory, and without a way to a pickle."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

MOST_HEADER_BYTES = 1 << 16
# Labels and offsets are read whole, before a plan can say what they take: at most 512 MiB of each.
MOST_LABELS = 1 << 26


@dataclass(frozen=True)
class Header:
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    start: int  # bytes before the data

    @property
    def num_bytes(self) -> int:
        """Of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: IO[bytes]) -> Header:
    """Raises ValueError when the file does not begin with such a header."""
    version = np.lib.format.read_magic(file)
    size_bytes = 2 if version == (1, 0) else 4
    size = file.read(size_bytes)
    num_bytes = int.from_bytes(size, "little")
    if num_bytes > MOST_HEADER_BYTES:
        raise ValueError(f"a header of {num_bytes} bytes; allowed: at most {MOST_HEADER_BYTES}")
    read = np.lib.format.read_array_header_1_0 if size_bytes == 2 else np.lib.format.read_array_header_2_0
    try:
        shape, fortran_order, dtype = read(io.BytesIO(size + file.read(num_bytes)))
    except (RecursionError, MemoryError):
        raise ValueError("a header that is nested too deeply") from None
    if min(shape, default=0) < 0:
        raise ValueError(f"a header with the shape {list(shape)}")
    return Header(shape, fortran_order, dtype, 8 + size_bytes + num_bytes)
