"""`data.name: npz_images`: images in one NumPy archive (.npz). For each part, `train` and `test`:

{part}_labels    integers [N]
{part}_images    uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], C = 1 or 3; or instead of it
{part}_jpeg      uint8 [bytes]: image files one after the other (JPEG, PNG ...), and
{part}_offsets   integers [N] or [N + 1]: where each begins, and where the last one ends

Image files stay encoded in memory. A batch decodes its own images. Nothing is unpickled.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from lowmem.data.image_source import PixelImages
from lowmem.data.images import (
    CHANNELS,
    Array,
    DecodedRows,
    ImageSet,
    Part,
    Rows,
    as_array,
    check_labels,
    open_image,
    same_shape,
)
from lowmem.errors import DataError

PARTS = ("train", "test")
# What a torn or an encrypted archive raises.
UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class NpzImagesData(PixelImages):
    name: Literal["npz_images"]
    path: str

    def _open(self) -> ImageSet:
        """Reads headers, labels, offsets and the first encoded image.

        Raises DataError when there is no such archive, or its arrays are missing or contradict each other.
        """
        path = self.path
        with open_archive(path) as archive:
            labels = {part: archive.read(f"{part}_labels") for part in PARTS}
            encoded = [part for part in PARTS if f"{part}_jpeg" in archive]
            offsets = {part: _offsets(archive, part, len(labels[part])) for part in encoded}
            pixels = {part: _pixel_shape(archive, part) for part in PARTS if part not in encoded}
            counts = {part: len(offsets[part]) - 1 if part in encoded else pixels[part][0] for part in PARTS}
            num_classes = check_labels(labels, counts, {part: f"{path}: {part}_labels" for part in PARTS})
            train, test = (
                _first_shape(archive, part, offsets[part]) if part in encoded else pixels[part][1:]
                for part in PARTS
            )
        same_shape(test, train, f"{path}: test images", "as in the train part; use one set")

        def load(part: str) -> Part:
            with open_archive(path) as archive:
                images: Rows
                if part in encoded:
                    images = _decoded(archive.read(f"{part}_jpeg"), offsets[part], train, f"{path}: {part}")
                else:
                    images = _channels_first(archive.read(f"{part}_images"))
            return {"image": images, "label": labels[part].astype(np.int64)}

        held_bytes = sum(
            int(offsets[part][-1]) if part in encoded else math.prod(pixels[part]) for part in PARTS
        )
        channels, height, width = train
        return ImageSet(
            (channels, height, width), num_classes, lambda: (load("train"), load("test")), held_bytes
        )


# ------------------------------------------------------------------------------------------------------------
# The archive


class Archive:
    """An archive's arrays by name. A header can be read without its array."""

    def __init__(self, path: str, inner: zipfile.ZipFile) -> None:
        self.path, self.inner = path, inner

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self.inner.NameToInfo

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        """(shape, dtype, bytes before the data). Raises DataError when the array cannot be used."""
        if name not in self:
            found = ", ".join(self.inner.namelist()).replace(".npy", "") or "none"
            raise DataError(
                f"{self.path}: no array {name}; found: {found}; allowed: {{part}}_labels, and "
                "{part}_images or {part}_jpeg with {part}_offsets, for train and test; add it"
            )
        with self.inner.open(f"{name}.npy") as file:
            old = np.lib.format.read_magic(file) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            start = file.tell()
        if dtype.hasobject:
            raise DataError(
                f"{self.path}: {name} holds Python objects (pickle), which could run code; "
                "allowed: numbers; save it as an array of them"
            )
        held = self.inner.getinfo(f"{name}.npy").file_size - start
        expected = math.prod(shape) * dtype.itemsize
        if held != expected:
            raise DataError(
                f"{self.path}: {name} holds {held} bytes; expected {expected} for {dtype} {list(shape)}; "
                "restore it from a copy"
            )
        return shape, dtype, start

    def read(self, name: str) -> Array:
        self.header(name)
        with self.inner.open(f"{name}.npy") as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


@contextmanager
def open_archive(path: str) -> Iterator[Archive]:
    """Whatever is wrong with the archive, now or while it is read, becomes a DataError."""
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                raise DataError(f"{path}: not a NumPy archive (.npz); give one, as numpy.savez writes it")
            with zipfile.ZipFile(file) as inner:
                yield Archive(path, inner)
    except UNREADABLE as problem:
        said = " ".join(str(problem).split())
        raise DataError(
            f"{path}: not readable as .npz ({said}); give one that is, or restore it from a copy"
        ) from None


# ------------------------------------------------------------------------------------------------------------
# Images as arrays


def _pixel_shape(archive: Archive, part: str) -> tuple[int, ...]:
    """(N, C, H, W) of `{part}_images`."""
    shape, dtype, _ = archive.header(f"{part}_images")
    first, last = (len(shape) == 4 and shape[axis] in (1, 3) for axis in (1, 3))
    if dtype != np.uint8 or not (len(shape) == 3 or first != last) or not math.prod(shape[1:]):
        allowed = "uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3, and only C"
        raise DataError(
            f"{archive.path}: {part}_images is {dtype} {list(shape)}; allowed: {allowed}; convert it"
        )
    if len(shape) == 3:
        return (shape[0], 1, *shape[1:])
    return (shape[0], shape[3], *shape[1:3]) if last else shape


def _channels_first(images: Array) -> Array:
    """A view [N, C, H, W]."""
    if images.ndim == 3:
        return images[:, None]
    return images.transpose(0, 3, 1, 2) if images.shape[3] in (1, 3) else images


# ------------------------------------------------------------------------------------------------------------
# Images as files


def _offsets(archive: Archive, part: str, count: int) -> Array:
    """int64 [N + 1]: image i is at bytes [i] to [i + 1]."""
    (num_bytes, *more), dtype, _ = archive.header(f"{part}_jpeg")
    offsets = archive.read(f"{part}_offsets")
    if dtype != np.uint8 or more or offsets.dtype.kind not in "iu" or offsets.ndim != 1:
        found = f"{dtype} {[num_bytes, *more]} with {part}_offsets {offsets.dtype} {list(offsets.shape)}"
        raise DataError(
            f"{archive.path}: {part}_jpeg is {found}; "
            "allowed: uint8 [bytes] with integers [N] or [N + 1]; convert them"
        )
    starts = np.append(offsets, num_bytes) if len(offsets) == count else offsets
    starts = starts.astype(np.int64)
    if not len(starts) or starts[0] != 0 or starts[-1] != num_bytes or (np.diff(starts) <= 0).any():
        raise DataError(
            f"{archive.path}: {part}_offsets does not say where each image begins; "
            f"allowed: rising from 0 to the {num_bytes} bytes of {part}_jpeg; restore both from one copy"
        )
    return starts


def _first_shape(archive: Archive, part: str, offsets: Array) -> tuple[int, ...]:
    """(C, H, W) of the first image, which all others must have."""
    with archive.inner.open(f"{part}_jpeg.npy") as file:
        file.read(archive.header(f"{part}_jpeg")[2])
        where = f"{archive.path}: {part} image 0"
        return _shape(open_image(file.read(int(offsets[1])), where), where)


def _shape(picture: Any, where: str) -> tuple[int, ...]:
    if picture.mode not in CHANNELS:
        raise DataError(f"{where}: pixels of mode {picture.mode}; allowed: L (grey) or RGB; convert it")
    return CHANNELS[picture.mode], picture.height, picture.width


def _decoded(files: Array, offsets: Array, shape: tuple[int, ...], where: str) -> DecodedRows:
    def read(index: int) -> Array:
        here = f"{where} image {index}"
        picture = open_image(files[offsets[index] : offsets[index + 1]].tobytes(), here)
        same_shape(_shape(picture, here), shape, here, "as the first image; make all of one size and kind")
        return as_array(picture)

    return DecodedRows(len(offsets) - 1, read)
