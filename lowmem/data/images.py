"""What all readers of images share: the set that they return, checks of labels and shapes, and pictures.

Pictures are decoded with Pillow when a batch asks for them. Pillow is imported only then.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lowmem.data.identity import MOST_CLASSES, MOST_SIDE, Fingerprint
from lowmem.data.opening import open_file
from lowmem.data.packages import imported
from lowmem.errors import DataError
from lowmem.units import counted

Array = np.ndarray[Any, Any]
# Pillow starts other programs for some of the formats that are left out.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
CHANNELS = {"L": 1, "RGB": 3}  # by Pillow's mode


class Rows(Protocol):
    """An array of samples, or a stand-in that makes the samples when `[rows]` asks for them."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any) -> Array: ...


Part = Mapping[str, Rows]  # by name (`image`, `label`, `tokens`), all equally long


@dataclass(frozen=True)
class ImageSet:
    """Images that were found and checked as far as headers and labels tell.

    `load` reads the training part and the test part. `mark` tells the images apart from all others.
    """

    image_shape: tuple[int, int, int]  # channels, height, width
    num_classes: int
    load: Callable[[], tuple[Part, Part]]
    mark: Callable[[Fingerprint], None]
    host_bytes: int = 0  # held in memory once both parts are loaded
    class_names: list[str] | None = None
    num_test: int | None = None  # of them, in the test part
    warnings: tuple[str, ...] = ()  # what lies there and is not used, a line each


class DecodedRows:
    """Images that are opened when a batch asks for them. `read(index)` returns one, uint8 [C, H, W]."""

    def __init__(self, count: int, read: Callable[[int], Array]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: Array | slice) -> Array:
        indices = range(self._count)[rows] if isinstance(rows, slice) else rows
        return np.stack([self._read(int(index)) for index in indices])


def bytes_to_float(batch: Mapping[str, Array]) -> dict[str, Array]:
    """Images of bytes 0 to 255 -> float32 from -1 to 1."""
    image = batch["image"].astype(np.float32, order="C") / np.float32(127.5) - np.float32(1)
    return {**batch, "image": image}


# ------------------------------------------------------------------------------------------------------------
# Labels and shapes


def check_labels(labels: Mapping[str, Array], counts: Mapping[str, int], where: Mapping[str, str]) -> int:
    """The number of classes.

    By part, train first: `labels` (integers [N]), `counts` of images, and `where` the labels come from, in
    words. Raises DataError unless each image has one label, no label is negative, and the training part has
    every label from 0 to the largest.
    """
    for part, found in labels.items():
        _check_part(part, found, counts[part], where[part])
    num_classes = int(labels["train"].max()) + 1
    # The largest label may be huge: as many classes as there are labels, and one more, show a gap.
    missing = np.setdiff1d(np.arange(min(num_classes, len(labels["train"]) + 1)), labels["train"])
    if len(missing):
        raise DataError(
            f"{where['train']}: labels up to {num_classes - 1}, but none is {missing[0]}; "
            "allowed: 0 to the largest, each at least once; renumber"
        )
    if labels["test"].max() >= num_classes:
        raise DataError(
            f"{where['test']}: found label {labels['test'].max()}; "
            f"allowed: 0 to {num_classes - 1}, as in the train part; give files of one set"
        )
    return num_classes


def _check_part(part: str, labels: Array, count: int, where: str) -> None:
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(
            f"{where}: labels are {labels.dtype} {list(labels.shape)}; "
            "allowed: integers, one for each image, from 0; number the classes"
        )
    if len(labels) != count:
        raise DataError(
            f"{where}: {counted(len(labels), 'label')} for {counted(count, 'image')}; "
            "allowed: one for each; restore both from one copy"
        )
    if not len(labels):
        raise DataError(f"{where}: no image in the {part} part; allowed: at least one; give more")
    if labels.min() < 0:
        raise DataError(
            f"{where}: found label {labels.min()}; "
            "allowed: 0 and above; take a part that has labels, or renumber"
        )


def check_extent(images: ImageSet) -> None:
    """Raises DataError for images or classes far beyond real ones."""
    if max(images.image_shape) > MOST_SIDE or images.num_classes > MOST_CLASSES:
        shape = " x ".join(map(str, images.image_shape))
        raise DataError(
            f"data: found images of {shape} (channels x height x width) in "
            f"{counted(images.num_classes, 'class', 'classes')}; "
            f"allowed: at most {MOST_SIDE} of each, and {MOST_CLASSES} classes; cut them, or renumber"
        )


def same_shape(found: Sequence[int], allowed: Sequence[int], where: str, cure: str) -> None:
    """Raises DataError unless two shapes (C, H, W) are equal."""
    if tuple(found) != tuple(allowed):
        first, second = (" x ".join(map(str, shape)) for shape in (found, allowed))
        raise DataError(f"{where}: found {first} (channels x height x width); allowed: {second}, {cure}")


# ------------------------------------------------------------------------------------------------------------
# Pictures


def pillow(what: str) -> Any:
    """Pillow's module Image. Raises DataError, beginning with `what`, when it is not installed."""
    return imported("PIL.Image", what)


def open_image(source: Any, where: str, check: Callable[[Any], object] | None = None) -> Any:
    """Pillow's picture from a path or from bytes, decoded and turned upright as its EXIF orientation says.

    `check` sees the header alone and may raise DataError before memory is taken for pixels. Of an animation
    the first frame is taken. Raises DataError, beginning with `where`, when the source cannot be decoded, or
    its header declares more pixels than Pillow's limit (89 million).
    """
    image_module = pillow(where)
    from PIL import ImageOps

    cure = f"allowed: {', '.join(FORMATS)}; restore it from a copy, or leave it out"
    unreadable = f"{where}: not readable as an image"
    if isinstance(source, str):
        file: Any = open_file(source, unreadable, cure)
    else:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():  # above its limit Pillow would print a warning and go on
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            picture = image_module.open(file, formats=FORMATS)
        with picture:
            if check is not None:
                check(picture)
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return picture
    except DataError:
        raise
    except Exception as problem:  # Pillow's decoders raise errors of many kinds
        said = " ".join(str(problem).split())
        raise DataError(f"{unreadable} ({said}); {cure}") from None
    finally:
        if isinstance(source, str):
            file.close()


def as_array(picture: Any) -> Array:
    """uint8 [C, H, W] of a picture of mode L or RGB."""
    pixels = np.asarray(picture, np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def square(source: Any, side: int, where: str) -> Array:
    """uint8 [3, side, side]: made RGB, cut to the largest square in the middle, resized (bicubic).

    What is transparent is laid on white, so that no hidden colour is seen. Raises DataError, beginning with
    `where`, when the source is no picture of 8 bits a channel.
    """
    picture = open_image(source, where)
    if picture.mode[0] in "IF":  # Pillow would cut these values off at 255
        raise DataError(f"{where}: pixels of mode {picture.mode}; allowed: 8 bits a channel; convert it")
    width, height = picture.size
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    box = (left, top, left + short, top + short)
    return as_array(_opaque(picture, where).resize((side, side), pillow(where).Resampling.BICUBIC, box))


def _opaque(picture: Any, where: str) -> Any:
    """The picture in RGB, on white where it is transparent."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    white = pillow(where).new("RGBA", layer.size, (255, 255, 255, 255))
    white.alpha_composite(layer)
    return white.convert("RGB")
