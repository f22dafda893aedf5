"""`data.name: idx_images`: a folder of images in MNIST's format (IDX), a big-endian header before raw bytes.

DIR/{train,t10k}-images-idx3-ubyte    the images, plain or .gz
DIR/{train,t10k}-labels-idx1-ubyte    their labels, plain or .gz

A dot may stand for the last dash but one (`train-images.idx3-ubyte`), and `test` for `t10k`. Images are kept
in memory as bytes. No more bytes are read, or unpacked, than a header declares. A batch converts its own
images to floats.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from lowmem.data.identity import Fingerprint
from lowmem.data.image_source import PixelImages
from lowmem.data.images import Array, ImageSet, Part, check_labels
from lowmem.data.npy import MOST_LABELS
from lowmem.data.opening import is_file, open_file, reaching
from lowmem.errors import DataError
from lowmem.files import printable
from lowmem.units import counted

PARTS = {"train": ("train",), "test": ("t10k", "test")}  # part -> how the names of its files begin
NUM_DIMS = {"images": 3, "labels": 1}
PACKING = 1032  # bytes that one byte of gzip (or of any DEFLATE) unpacks to at most
SHOWN = 10  # names of files in a message
GIVE = "give the folder that holds all four MNIST-format files"


class IdxImagesData(PixelImages):
    name: Literal["idx_images"]
    path: str

    def _open(self) -> ImageSet:
        """Reads headers and labels. `load` then reads the images.

        Both raise DataError for a file that is not whole, and this one when the files contradict each other.
        """
        paths = {part: self._find(part, "images") for part in PARTS}
        where = {part: self._find(part, "labels") for part in PARTS}
        shapes = {part: _read(path, 3)[0] for part, path in paths.items()}
        counts = {part: shape[0] for part, shape in shapes.items()}
        labels = {part: _labels(path, counts[part]) for part, path in where.items()}
        num_classes = check_labels(labels, counts, {part: str(path) for part, path in where.items()})
        if shapes["train"][1:] != shapes["test"][1:]:
            train, test = (f"{height} x {width}" for _, height, width in shapes.values())
            raise DataError(
                f"{paths['test']}: images of {test} pixels; "
                f"allowed: {train}, as in the train part; give files of one set"
            )
        image_shape = (1, shapes["train"][1], shapes["train"][2])

        def load(part: str) -> Part:
            shape, body = _read(paths[part], 3, whole=True)
            images = np.frombuffer(body, np.uint8).reshape(shape[0], *image_shape)
            return {"image": images, "label": labels[part]}

        def mark(fingerprint: Fingerprint) -> None:
            for part in PARTS:
                fingerprint.file(f"{part} images", paths[part])
                fingerprint.file(f"{part} labels", where[part])
            fingerprint.num_items = sum(counts.values())

        held_bytes = sum(math.prod(shape) for shape in shapes.values())
        return ImageSet(
            image_shape,
            num_classes,
            lambda: (load("train"), load("test")),
            mark,
            held_bytes,
            num_test=counts["test"],
        )

    def _find(self, part: str, kind: str) -> Path:
        where = f"data.path: {printable(self.path)}"
        for start in PARTS[part]:
            for dash in "-.":
                name = f"{start}-{kind}{dash}idx{NUM_DIMS[kind]}-ubyte"
                for path in (Path(self.path, name), Path(self.path, f"{name}.gz")):
                    if is_file(path, where, GIVE):
                        return path
        name = f"{PARTS[part][0]}-{kind}-idx{NUM_DIMS[kind]}-ubyte"
        raise DataError(
            f"data.path: no file {name} or {name}.gz in the folder '{printable(self.path)}'; "
            f"found: {self._found(where)}; {GIVE}"
        )

    def _found(self, where: str) -> str:
        """The first names in the folder, in words."""
        with reaching(where, GIVE):
            names = sorted(os.listdir(self.path))
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return f"{', '.join(map(printable, names[:SHOWN]))}{more}" if names else "nothing"


def _labels(path: Path, num_images: int) -> Array:
    """int64 [N], of a file that declares as many labels as there are images."""
    (count,), _ = _read(path, 1)
    if count != num_images or count > MOST_LABELS:
        raise DataError(
            f"{path}: {counted(count, 'label')} for {counted(num_images, 'image')}; "
            f"allowed: one for each, at most {MOST_LABELS}; restore both from one copy"
        )
    return np.frombuffer(_read(path, 1, whole=True)[1], np.uint8).astype(np.int64)


def _read(path: Path, num_dims: int, whole: bool = False) -> tuple[tuple[int, ...], bytes]:
    """The shape that the header names, and the bytes after the header if `whole`.

    Raises DataError when the header is not IDX, or the bytes are not as many as it says.
    """
    cure = "restore it from a copy"
    try:
        with open_file(path, str(path), cure) as file:
            size, packed = os.fstat(file.fileno()).st_size, path.suffix == ".gz"
            source = gzip.GzipFile(fileobj=file) if packed else file
            shape = _shape(source.read(4 + 4 * num_dims), num_dims, path)
            expected, body = math.prod(shape), b""
            if expected > size * (PACKING if packed else 1):
                raise DataError(
                    f"{path}: a file of {counted(size, 'byte')} cannot hold {_words(shape)}, "
                    f"as its header says; {cure}"
                )
            if whole:
                body = source.read(expected)
                surplus = len(source.read(1)) if packed else size - file.tell()
    except (OSError, EOFError, zlib.error) as problem:  # not gzip, or cut off
        raise DataError(f"{path}: not readable to its end ({problem}); {cure}") from None
    if whole and (len(body) != expected or surplus):
        beyond = len(body) + surplus
        found = f"more than {expected}" if surplus and packed else str(beyond)
        raise DataError(
            f"{path}: {found} bytes after the header; expected {expected} = {_words(shape)}; {cure}"
        )
    return shape, body


def _shape(header: bytes, num_dims: int, path: Path) -> tuple[int, ...]:
    if len(header) < 4 + 4 * num_dims:
        raise DataError(
            f"{path}: found {counted(len(header), 'byte')}; "
            f"allowed: at least the header's {4 + 4 * num_dims}; restore it from a copy"
        )
    magic = 0x800 + num_dims  # 8 stands for unsigned bytes
    found, *shape = struct.unpack(f">{1 + num_dims}I", header)
    if found != magic:
        raise DataError(
            f"{path}: magic number {found}; expected {magic} (IDX, unsigned bytes, {num_dims} dimensions); "
            "give a file of that format"
        )
    if not math.prod(shape):
        raise DataError(
            f"{path}: header says {_words(shape)}; allowed: at least one of each; restore it from a copy"
        )
    return tuple(shape)


def _words(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
