"""What all readers of images share: what they hand over, labels, and decoding with Pillow by the batch."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from lowmem.errors import DataError

Array = np.ndarray[Any, Any]
FORMATS = (
    "PNG",
    "JPEG",
    "BMP",
    "GIF",
    "PPM",
    "TIFF",
    "WEBP",
)  # Pillow starts other programs for some of the others
CHANNELS = {"L": 1, "RGB": 3}  # Pillow's modes


class Rows(Protocol):
    """An array of samples, or what stands for one: `[rows]` makes those that a batch asks for."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any) -> Array: ...


Part = Mapping[str, Rows]  # equally long, by name: `image`, `label`


@dataclass(frozen=True)
class ImageSet:
    """Images found and checked as far as headers and labels tell; `load` reads the training and the test
    part.
    """

    image_shape: tuple[int, int, int]  # channels, height, width
    num_classes: int
    load: Callable[[], tuple[Part, Part]]
    host_bytes: int = 0  # that both parts hold once loaded


class DecodedRows:
    """Images that are opened when a batch asks for them: `read(index)` gives one, uint8 [C, H, W]."""

    def __init__(self, count: int, read: Callable[[int], Array]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: Array | slice) -> Array:
        indices = range(self._count)[rows] if isinstance(rows, slice) else rows
        return np.stack([self._read(int(index)) for index in indices])


def bytes_to_float(batch: Mapping[str, Array]) -> dict[str, Array]:
    """Images of bytes 0 to 255 -> float32 -1 to 1."""
    return {
        **batch,
        "image": batch["image"].astype(np.float32, order="C") / np.float32(127.5) - np.float32(1),
    }


# ------------------------------------------------------------------------------------------------------------
# Labels


def check_labels(labels: Mapping[str, Array], counts: Mapping[str, int], where: Mapping[str, str]) -> int:
    """The number of classes of integer labels [N], given by part (train first) with the number of images and
    the words that name their source.

    Raises DataError unless there is one for each image, each is at least 0, and each up to the largest is in
    the training part.
    """
    for part, found in labels.items():
        if found.dtype.kind not in "iu" or found.ndim != 1:
            described = f"{found.dtype} {list(found.shape)}"
            raise DataError(
                f"{where[part]}: labels are {described}; allowed: integers, one for each image, from 0; number the classes"
            )
        if len(found) != counts[part]:
            raise DataError(
                f"{where[part]}: {len(found)} labels for {counts[part]} images; allowed: one for each; restore both from one copy"
            )
        if not len(found):
            raise DataError(f"{where[part]}: no image in the {part} part; allowed: at least one; give more")
        if found.min() < 0:
            raise DataError(
                f"{where[part]}: found label {found.min()}; allowed: 0 and above; take a part that has labels, or renumber"
            )
    num_classes = int(labels["train"].max()) + 1
    missing = np.setdiff1d(np.arange(min(num_classes, len(labels["train"]) + 1)), labels["train"])
    if len(missing):
        found_most = f"labels up to {num_classes - 1}, but none is {missing[0]}"
        raise DataError(
            f"{where['train']}: {found_most}; allowed: 0 to the largest, each at least once; renumber"
        )
    if labels["test"].max() >= num_classes:
        found_test = (
            f"found label {labels['test'].max()}; allowed: 0 to {num_classes - 1}, as in the train part"
        )
        raise DataError(f"{where['test']}: {found_test}; give files of one set")
    return num_classes


def same_shape(found: Sequence[int], allowed: Sequence[int], where: str, cure: str) -> None:
    """Raises DataError unless two shapes (C, H, W) are equal."""
    if tuple(found) != tuple(allowed):
        first, second = (" x ".join(map(str, shape)) for shape in (found, allowed))
        raise DataError(f"{where}: found {first} (channels x height x width); allowed: {second}, {cure}")


# ------------------------------------------------------------------------------------------------------------
# Pictures


def pillow(what: str) -> ModuleType:
    """Pillow's module Image. Raises DataError, beginning with `what`, when it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise DataError(
            f"{what} needs Pillow, which is not installed; install the extra: pip install 'lowmem[data]'"
        ) from None
    return Image


def open_image(source: Any, where: str) -> Any:
    """A picture of Pillow's, decoded, from a path or from bytes.

    Raises DataError, beginning with `where`, when it is none.
    """
    image_module = pillow(where)
    try:
        with image_module.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS
        ) as picture:
            picture.load()
            return picture
    except Exception as problem:  # its decoders raise errors of many kinds
        said = " ".join(str(problem).split())
        raise DataError(
            f"{where}: not readable as an image ({said}); allowed: {', '.join(FORMATS)}; restore it from a copy, or leave it out"
        ) from None


def as_array(picture: Any) -> Array:
    """uint8 [C, H, W] of a picture of mode L or RGB."""
    pixels = np.asarray(picture, np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def square(source: Any, side: int, where: str) -> Array:
    """uint8 [3, side, side]: made RGB, the largest square in the middle, resized (bicubic)."""
    picture = open_image(source, where)
    if picture.mode[0] in "IF":  # Pillow would cut their values off at 255
        raise DataError(f"{where}: pixels of mode {picture.mode}; allowed: 8 bits a channel; convert it")
    width, height = picture.size
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    box = (left, top, left + short, top + short)
    return as_array(picture.convert("RGB").resize((side, side), pillow(where).Resampling.BICUBIC, box))
