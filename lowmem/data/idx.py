"""`data.name: idx_images`: a folder of images in MNIST's format (IDX), a big-endian header before raw bytes.

DIR/{train,t10k}-images-idx3-ubyte    the images, plain or .gz
DIR/{train,t10k}-labels-idx1-ubyte    their labels, plain or .gz

Images are kept in memory as bytes. A batch converts its own images to floats.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np

from lowmem.data.image_source import PixelImages
from lowmem.data.images import Array, ImageSet, Part, check_labels
from lowmem.errors import DataError

PARTS = {"train": "train", "test": "t10k"}  # part -> how the names of its files begin
NUM_DIMS = {"images": 3, "labels": 1}


class IdxImagesData(PixelImages):
    name: Literal["idx_images"]
    path: str

    def _open(self) -> ImageSet:
        """Reads headers and labels. `load` then reads the images.

        Both raise DataError for a file that is not whole, and this one when the files contradict each other.
        """
        paths = {part: self._find(part, "images") for part in PARTS}
        where = {part: self._find(part, "labels") for part in PARTS}
        shapes = {part: _read_header(path)[0] for part, path in paths.items()}
        labels = {part: _read(path).astype(np.int64) for part, path in where.items()}
        counts = {part: shape[0] for part, shape in shapes.items()}
        num_classes = check_labels(labels, counts, {part: str(path) for part, path in where.items()})
        if shapes["train"][1:] != shapes["test"][1:]:
            train, test = (f"{height} x {width}" for _, height, width in shapes.values())
            raise DataError(
                f"{paths['test']}: images of {test} pixels; "
                f"allowed: {train}, as in the train part; give files of one set"
            )
        image_shape = (1, shapes["train"][1], shapes["train"][2])

        def load(part: str) -> Part:
            return {"image": _read(paths[part]).reshape(-1, *image_shape), "label": labels[part]}

        held_bytes = sum(math.prod(shape) for shape in shapes.values())
        return ImageSet(image_shape, num_classes, lambda: (load("train"), load("test")), held_bytes)

    def _find(self, part: str, kind: str) -> Path:
        name = f"{PARTS[part]}-{kind}-idx{NUM_DIMS[kind]}-ubyte"
        for path in (Path(self.path, name), Path(self.path, f"{name}.gz")):
            if path.is_file():
                return path
        raise DataError(
            f"data.path: no file {name} or {name}.gz in the folder '{self.path}'; "
            "give the folder that holds all four MNIST-format files"
        )


def _open_file(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else open(path, "rb")


def _read_header(path: Path, whole: bool = False) -> tuple[tuple[int, ...], bytes]:
    """The shape that the header names, and the bytes after the header if `whole`.

    Raises DataError when the header is not IDX, or the bytes are not as many as it says.
    """
    num_dims = NUM_DIMS["images" if "-images-" in path.name else "labels"]
    header_bytes, magic = 4 + 4 * num_dims, 0x800 + num_dims  # 8 stands for unsigned bytes
    try:
        with _open_file(path) as file:
            header, body = file.read(header_bytes), file.read() if whole else b""
    except (OSError, EOFError, zlib.error) as problem:  # not gzip, or cut off
        raise DataError(f"{path}: not readable to its end ({problem}); restore it from a copy") from None
    if len(header) < header_bytes:
        raise DataError(
            f"{path}: found {len(header)} bytes; "
            f"allowed: at least the header's {header_bytes}; restore it from a copy"
        )
    found, *shape = struct.unpack(f">{1 + num_dims}I", header)
    if found != magic:
        raise DataError(
            f"{path}: magic number {found}; expected {magic} (IDX, unsigned bytes, {num_dims} dimensions); "
            "give a file of that format"
        )
    size, named = math.prod(shape), " x ".join(map(str, shape))
    if not size:
        raise DataError(f"{path}: header says {named}; allowed: at least one of each; restore it from a copy")
    if whole and len(body) != size:
        raise DataError(
            f"{path}: {len(body)} bytes after the header; expected {size} = {named}; restore it from a copy"
        )
    return tuple(shape), body


def _read(path: Path) -> Array:
    shape, body = _read_header(path, whole=True)
    return np.frombuffer(body, np.uint8).reshape(shape)
