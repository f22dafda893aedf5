"""`data.name: npz_images`: images in one NumPy archive (.npz). For each part, `train` and `test`:

{part}_labels    integers [N]
{part}_images    uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], C = 1 or 3; or instead of it
{part}_jpeg      uint8 [bytes]: image files one after the other (JPEG, PNG ...), and
{part}_offsets   integers [N] or [N + 1]: where each begins, and where the last one ends

Image files stay encoded in memory. A batch decodes its own images. Nothing is unpickled. No more is unpacked
than headers declare, and labels, offsets and pictures are measured before they are unpacked.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lowmem.data.identity import Fingerprint
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
from lowmem.data.npy import MOST_LABELS, Header, read_header
from lowmem.data.opening import open_file
from lowmem.errors import DataError
from lowmem.files import printable

PARTS = ("train", "test")
# What a torn or an encrypted archive raises.
UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
PACKING = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}  # method -> what one byte unpacks to at most
SHOWN = 20  # names of arrays in a message


class NpzImagesData(PixelImages):
    name: Literal["npz_images"]
    path: str

    def _open(self) -> ImageSet:
        """Reads headers, labels, offsets and the first encoded image.

        Raises DataError when there is no such archive, or its arrays are missing or contradict each other.
        """
        path = self.path
        with open_archive(path) as archive:
            labels = {part: archive.read_row(f"{part}_labels") for part in PARTS}
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

        def mark(fingerprint: Fingerprint) -> None:
            fingerprint.file("archive", Path(path))
            fingerprint.num_items = sum(counts.values())

        return ImageSet(
            (channels, height, width),
            num_classes,
            lambda: (load("train"), load("test")),
            mark,
            held_bytes,
            num_test=counts["test"],
        )


# ------------------------------------------------------------------------------------------------------------
# The archive


class Archive:
    """An archive's arrays by name. A header can be read without its array."""

    def __init__(self, path: str, inner: zipfile.ZipFile) -> None:
        self.path, self.inner = path, inner

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self.inner.NameToInfo

    def header(self, name: str) -> Header:
        """Raises DataError when the array cannot be used."""
        if name not in self:
            names = [entry.removesuffix(".npy") for entry in self.inner.namelist()]
            found = ", ".join(map(printable, names[:SHOWN])) + (" ..." if len(names) > SHOWN else "")
            raise DataError(
                f"{self.path}: no array {name}; found: {found or 'none'}; allowed: {{part}}_labels, and "
                "{part}_images or {part}_jpeg with {part}_offsets, for train and test; add it"
            )
        entry = self.inner.getinfo(f"{name}.npy")
        if entry.file_size > entry.compress_size * PACKING.get(entry.compress_type, 0):
            raise DataError(
                f"{self.path}: {name} is said to unpack from {entry.compress_size} bytes to "
                f"{entry.file_size}; allowed: plain or DEFLATE, as numpy.savez writes them; save it again"
            )
        with self.inner.open(entry) as file:
            header = read_header(file)
        if header.dtype.hasobject:
            raise DataError(
                f"{self.path}: {name} holds Python objects (pickle), which could run code; "
                "allowed: numbers; save it as an array of them"
            )
        held, expected = entry.file_size - header.start, header.num_bytes
        if held != expected:
            raise DataError(
                f"{self.path}: {name} holds {held} bytes; expected {expected} for {header.dtype} "
                f"{list(header.shape)}; restore it from a copy"
            )
        return header

    def read(self, name: str) -> Array:
        self.header(name)
        with self.inner.open(f"{name}.npy") as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))

    def read_row(self, name: str) -> Array:
        """Labels or offsets, [N], refused before they are unpacked where they are no such thing."""
        header = self.header(name)
        if header.dtype.kind not in "iu" or len(header.shape) != 1 or header.shape[0] > MOST_LABELS:
            raise DataError(
                f"{self.path}: {name}: labels are {header.dtype} {list(header.shape)}; allowed: integers, "
                f"one for each image, at most {MOST_LABELS}; number the classes"
            )
        return self.read(name)


@contextmanager
def open_archive(path: str) -> Iterator[Archive]:
    """Whatever is wrong with the archive, now or while it is read, becomes a DataError."""
    try:
        with open_file(path, f"data.path: {printable(path)}", "give the path of an archive (.npz)") as file:
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
    header = archive.header(f"{part}_images")
    shape, dtype = header.shape, header.dtype
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
    files, rows = archive.header(f"{part}_jpeg"), archive.header(f"{part}_offsets")
    if (
        files.dtype != np.uint8
        or len(files.shape) != 1
        or rows.dtype.kind not in "iu"
        or len(rows.shape) != 1
    ):
        found = f"{files.dtype} {list(files.shape)} with {part}_offsets {rows.dtype} {list(rows.shape)}"
        raise DataError(
            f"{archive.path}: {part}_jpeg is {found}; "
            "allowed: uint8 [bytes] with integers [N] or [N + 1]; convert them"
        )
    (num_bytes,), offsets = files.shape, archive.read_row(f"{part}_offsets")
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
        file.read(archive.header(f"{part}_jpeg").start)
        where = f"{archive.path}: {part} image 0"
        return _shape(
            open_image(file.read(int(offsets[1])), where, lambda found: _shape(found, where)), where
        )


def _shape(picture: Any, where: str) -> tuple[int, ...]:
    if picture.mode not in CHANNELS:
        raise DataError(f"{where}: pixels of mode {picture.mode}; allowed: L (grey) or RGB; convert it")
    if picture.has_transparency_data:
        raise DataError(f"{where}: a transparent colour; allowed: L (grey) or RGB without one; convert it")
    return CHANNELS[picture.mode], picture.height, picture.width


def _decoded(files: Array, offsets: Array, shape: tuple[int, ...], where: str) -> DecodedRows:
    def read(index: int) -> Array:
        here = f"{where} image {index}"
        cure = "as the first image; make all of one size and kind"

        def check(picture: Any) -> None:
            found = _shape(picture, here)
            if sorted(found) != sorted(shape):  # it may lie on its side
                same_shape(found, shape, here, cure)

        picture = open_image(files[offsets[index] : offsets[index + 1]].tobytes(), here, check)
        same_shape(_shape(picture, here), shape, here, cure)
        return as_array(picture)

    return DecodedRows(len(offsets) - 1, read)
