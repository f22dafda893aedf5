"""Images in MNIST's format (IDX): a big-endian header, then raw bytes. Kept as bytes, made float by the
batch.

train-images-idx3-ubyte train-labels-idx1-ubyte t10k-images-idx3-ubyte t10k-labels-idx1-ubyte each plain or
.gz
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from lowmem.data.config import IdxImagesData
from lowmem.data.images import Array, ImageSet, Part, check_labels
from lowmem.errors import DataError

PARTS = {"train": "train", "test": "t10k"}  # part -> how its files' names begin


def open_idx(config: IdxImagesData) -> ImageSet:
    """Reads headers and labels.

    Raises DataError when they do not agree; `load` does on any file that is not whole.
    """
    paths = {part: _find(config, part, "images") for part in PARTS}
    where = {part: _find(config, part, "labels") for part in PARTS}
    shapes = {part: _read_header(path)[0] for part, path in paths.items()}
    labels = {part: _read(path).astype(np.int64) for part, path in where.items()}
    num_classes = check_labels(
        labels,
        {part: shape[0] for part, shape in shapes.items()},
        {part: str(path) for part, path in where.items()},
    )
    if shapes["train"][1:] != shapes["test"][1:]:
        train, test = (f"{height} x {width}" for _, height, width in shapes.values())
        raise DataError(
            f"{paths['test']}: images of {test} pixels; allowed: {train}, as in the train part; give files of one set"
        )
    image_shape = (1, shapes["train"][1], shapes["train"][2])

    def load(part: str) -> Part:
        return {"image": _read(paths[part]).reshape(-1, *image_shape), "label": labels[part]}

    held_bytes = sum(math.prod(shape) for shape in shapes.values())
    return ImageSet(image_shape, num_classes, lambda: (load("train"), load("test")), held_bytes)


def _find(config: IdxImagesData, part: str, kind: str) -> Path:
    name = f"{PARTS[part]}-{kind}-idx{_num_dims(kind)}-ubyte"
    for path in (Path(config.path, name), Path(config.path, f"{name}.gz")):
        if path.is_file():
            return path
    raise DataError(
        f"data.path: no file {name} or {name}.gz in the folder '{config.path}'; give the folder that holds all four MNIST-format files"
    )


def _num_dims(kind: str) -> int:
    return {"images": 3, "labels": 1}[kind]


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else open(path, "rb")


def _read_header(path: Path, whole: bool = False) -> tuple[tuple[int, ...], bytes]:
    """The sizes that the header names, and the bytes after it if `whole`.

    Raises DataError where they are not as long as it says.
    """
    num_dims = _num_dims("images" if "-images-" in path.name else "labels")
    header_bytes, magic = 4 + 4 * num_dims, 0x800 + num_dims  # 8: unsigned bytes
    try:
        with _open(path) as file:
            header, body = file.read(header_bytes), file.read() if whole else b""
    except (OSError, EOFError, zlib.error) as problem:  # not gzip, or cut off
        raise DataError(f"{path}: not readable to its end ({problem}); restore it from a copy") from None
    if len(header) < header_bytes:
        raise DataError(
            f"{path}: found {len(header)} bytes; allowed: at least the header's {header_bytes}; restore it from a copy"
        )
    found, *shape = struct.unpack(f">{1 + num_dims}I", header)
    if found != magic:
        raise DataError(
            f"{path}: magic number {found}; expected {magic} (IDX, unsigned bytes, {num_dims} dimensions); give a file of that format"
        )
    if not math.prod(shape):
        raise DataError(
            f"{path}: header says {' x '.join(map(str, shape))}; allowed: at least one of each; restore it from a copy"
        )
    if whole and len(body) != math.prod(shape):
        sizes = (
            f"{len(body)} bytes after the header; expected {math.prod(shape)} = {' x '.join(map(str, shape))}"
        )
        raise DataError(f"{path}: {sizes}; restore it from a copy")
    return tuple(shape), body


def _read(path: Path) -> Array:
    shape, body = _read_header(path, whole=True)
    return np.frombuffer(body, np.uint8).reshape(shape)
