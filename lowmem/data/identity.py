"""What tells the data of a run apart from all others, and what the run must keep to be read without them.

A run keeps a `DataIdentity` in its plan. A run goes on only with data of the same fingerprint. A finished run
is sampled and exported from the shapes, class names and alphabet that stand there. How pixels and latents
become numbers is part of the recipe and of this package, and the noise levels measured from the targets
stand in the plan beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import xxhash
from pydantic import Field

from lowmem.data.opening import open_file, reaching
from lowmem.files import printable
from lowmem.schema import Section
from lowmem.units import MIB

END_BYTES = 64 * MIB  # of a very large file: hashed whole at its beginning and at its end
SPOTS, SPOT_BYTES = 64, MIB  # and as many spots between them
# Bounds far beyond real data, so that a typing error or a forged plan makes no model of that size.
MOST_SIDE = 2**16  # pixels or channels; no camera has as many
MOST_CLASSES = 2**20  # the largest public sets have some 2^15
MOST_VOCAB = 2**22  # the largest published vocabularies have 2^18 tokens, and Unicode 2^20 characters
MOST_COUNT = 2**63 - 1  # of bytes or items: what every reader of JSON takes
Side = Annotated[int, Field(gt=0, le=MOST_SIDE)]
ImageShape = Annotated[list[Side], Field(min_length=3, max_length=3)]  # channels, height, width
Classes = Annotated[int, Field(gt=0, le=MOST_CLASSES)]
Vocabulary = Annotated[int, Field(gt=0, le=MOST_VOCAB)]
Items = Annotated[int, Field(ge=0, le=MOST_COUNT)]
MENDED = "mend this, then run the same command again"


class DataIdentity(Section):
    """The fingerprint of a run's data, and what the run needs of them to be read."""

    fingerprint: str  # XXH3, 128 bits
    num_bytes: Items
    num_items: Items  # pictures, latents, or files of a text
    image_shape: ImageShape | None = None
    num_classes: Classes | None = None
    vocab_size: Vocabulary | None = None
    image_scale: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None  # see `data.scale`
    class_names: list[str] | None = None  # by label, where classes have names
    alphabet: list[str] | None = None  # by token, where tokens are the characters of the text
    tokenizer: str | None = None  # the fingerprint of a tokenizer's own files
    earlier: list[str] = []  # fingerprints of data that the run was trained on before a change was accepted


class Fingerprint:
    """Takes in facts and contents, in an order that is the same each time."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self.num_bytes = self.num_items = 0

    def fact(self, *facts: Any) -> None:
        """Values that JSON can hold."""
        self._hash.update(json.dumps(facts).encode())

    def file(self, name: str, path: Path) -> None:
        """A file by its size and content.

        Of a file above 192 MiB the first and the last 64 MiB count, and 64 evenly spaced MiB between them. An
        edit elsewhere that leaves the size as it was is not seen. Raises DataError.
        """
        where = f"data: {printable(path)}"
        with open_file(path, where, MENDED) as file, reaching(where, MENDED):
            size = file.seek(0, 2)
            self.fact(name, size)
            for start, length in _spans(size):
                file.seek(start)
                while length and (chunk := file.read(min(length, MIB))):
                    self._hash.update(chunk)
                    length -= len(chunk)
        self.num_bytes += size

    def array(self, name: str, array: np.ndarray[Any, Any]) -> None:
        self.fact(name, list(array.shape), str(array.dtype))
        self._hash.update(np.ascontiguousarray(array).tobytes())
        self.num_bytes += array.nbytes

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def identity(self, **needed: Any) -> DataIdentity:
        return DataIdentity(
            fingerprint=self.hexdigest(), num_bytes=self.num_bytes, num_items=self.num_items, **needed
        )


def _spans(size: int) -> Iterator[tuple[int, int]]:
    """(start, length) of what is hashed of a file."""
    if size <= 2 * END_BYTES + SPOTS * SPOT_BYTES:
        yield 0, size
        return
    yield 0, END_BYTES
    between = size - 2 * END_BYTES - SPOT_BYTES
    for spot in range(SPOTS):
        yield END_BYTES + between * spot // (SPOTS - 1), SPOT_BYTES
    yield size - END_BYTES, END_BYTES
