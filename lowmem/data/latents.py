"""Latents of an autoencoder, computed beforehand, in NumPy's format: mapped into memory, so a batch reads the
pages that it takes.

DIR/{train,test}_latents.npy float16 or float32 [N, C, H, W] DIR/{train,test}_labels.npy integers [N]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lowmem.data.config import LatentArraysData
from lowmem.data.images import Array, ImageSet, check_labels, same_shape
from lowmem.errors import DataError

PARTS = ("train", "test")


def open_latents(config: LatentArraysData) -> ImageSet:
    """Reads headers and labels.

    Raises DataError: a file missing, torn, of another kind, or at odds with the others.
    """
    paths = {part: Path(config.path, f"{part}_latents.npy") for part in PARTS}
    where = {part: Path(config.path, f"{part}_labels.npy") for part in PARTS}
    latents = {part: _map(path) for part, path in paths.items()}
    labels = {part: _map(path) for part, path in where.items()}
    for part, found in latents.items():
        if found.ndim != 4 or found.dtype.kind != "f" or found.dtype.itemsize not in (2, 4):
            described = f"{found.dtype} {list(found.shape)}"
            raise DataError(
                f"{paths[part]}: found {described}; allowed: float16 or float32 [N, C, H, W]; convert it"
            )
    num_classes = check_labels(
        labels,
        {part: len(found) for part, found in latents.items()},
        {part: str(path) for part, path in where.items()},
    )
    same_shape(
        latents["test"].shape[1:],
        latents["train"].shape[1:],
        str(paths["test"]),
        "as in the train part; give files of one set",
    )
    _, channels, height, width = latents["train"].shape
    train, test = ({"image": latents[part], "label": labels[part].astype(np.int64)} for part in PARTS)
    return ImageSet((channels, height, width), num_classes, lambda: (train, test))


def _map(path: Path) -> Array:
    try:
        return np.asarray(np.lib.format.open_memmap(path, mode="r"))  # numpy.load without its way to a pickle
    except FileNotFoundError:
        raise DataError(
            f"data.path: no file {path.name} in the folder '{path.parent}'; give the folder that holds all four .npy files"
        ) from None
    except (OSError, ValueError, EOFError) as problem:  # among them: a pickle, an empty array
        said = " ".join(str(problem).split())
        raise DataError(
            f"{path}: not readable as .npy ({said}); allowed: an array of numbers that is not empty; save it again"
        ) from None
