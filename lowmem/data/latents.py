"""`data.name: latent_arrays`: an autoencoder's latents, computed beforehand, in NumPy's format.

DIR/{train,test}_latents.npy    float16 or float32 [N, C, H, W]
DIR/{train,test}_labels.npy     integers [N]

The files are mapped into memory, so a batch reads only the pages that it takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from lowmem.data.datasets import ArrayBatch
from lowmem.data.identity import Fingerprint
from lowmem.data.image_source import DeclaredImages
from lowmem.data.images import Array, ImageSet, check_labels, same_shape
from lowmem.data.npy import MOST_LABELS, read_header
from lowmem.data.opening import is_file, open_file
from lowmem.errors import DataError
from lowmem.files import printable

PARTS = ("train", "test")


class LatentArraysData(DeclaredImages):
    name: Literal["latent_arrays"]
    path: str
    # Latents are multiplied by this for a variance of about 1. The default is Stable Diffusion's factor.
    # Between the bounds float32 holds the squares of what comes out.
    scale: Annotated[float, Field(ge=1e-6, le=1e6)] = 0.18215

    @property
    def decoded(self) -> bool:
        return False

    def to_floats(self, batch: ArrayBatch) -> ArrayBatch:
        return {**batch, "image": batch["image"].astype(np.float32, order="C") * np.float32(self.scale)}

    def _open(self) -> ImageSet:
        """Reads headers and labels.

        Raises DataError when a file is missing, torn, of another kind, or contradicts the others.
        """
        paths = {part: Path(self.path, f"{part}_latents.npy") for part in PARTS}
        where = {part: Path(self.path, f"{part}_labels.npy") for part in PARTS}
        latents = {part: _map(path) for part, path in paths.items()}
        labels = {part: _map(path) for part, path in where.items()}
        for part, found in latents.items():
            if found.ndim != 4 or found.dtype.kind != "f" or found.dtype.itemsize not in (2, 4):
                raise DataError(
                    f"{paths[part]}: found {found.dtype} {list(found.shape)}; "
                    "allowed: float16 or float32 [N, C, H, W]; convert it"
                )
        counts = {part: len(found) for part, found in latents.items()}
        num_classes = check_labels(labels, counts, {part: str(path) for part, path in where.items()})
        train_shape, test_shape = (latents[part].shape[1:] for part in PARTS)
        cure = "as in the train part; give files of one set"
        same_shape(test_shape, train_shape, str(paths["test"]), cure)
        channels, height, width = train_shape
        train, test = ({"image": latents[part], "label": labels[part].astype(np.int64)} for part in PARTS)

        def mark(fingerprint: Fingerprint) -> None:
            for part in PARTS:
                fingerprint.file(f"{part} latents", paths[part])
                fingerprint.file(f"{part} labels", where[part])
            fingerprint.num_items = sum(counts.values())

        shape = channels, height, width
        return ImageSet(shape, num_classes, lambda: (train, test), mark, num_test=counts["test"])


def _map(path: Path) -> Array:
    give = "give the folder that holds all four .npy files"
    if not is_file(path, f"data.path: {printable(path.parent)}", give):
        raise DataError(f"data.path: no file {path.name} in the folder '{printable(path.parent)}'; {give}")
    cure = "allowed: an array of numbers that is not empty; save it again"
    try:
        with open_file(path, f"{printable(path)}: not readable as .npy", cure) as file:
            header = read_header(file)
            if header.dtype.hasobject:
                raise ValueError("it holds Python objects")
            if len(header.shape) == 1 and header.shape[0] > MOST_LABELS:
                raise ValueError(f"{header.shape[0]} labels; allowed: at most {MOST_LABELS}")
            order: Literal["F", "C"] = "F" if header.fortran_order else "C"
            # a mapping beyond the file's end would be granted, and its pages missing
            if header.start + header.num_bytes > file.seek(0, 2):
                raise ValueError("the file is shorter than its header says")
            return np.asarray(np.memmap(file, header.dtype, "r", header.start, header.shape, order))
    except (OSError, ValueError, EOFError) as problem:  # a pickle and an empty array are among them
        said = " ".join(str(problem).split())
        raise DataError(f"{printable(path)}: not readable as .npy ({said}); {cure}") from None
