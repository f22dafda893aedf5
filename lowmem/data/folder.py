"""Images in folders, one folder a class; classes are numbered in the order of their names, images opened by
the batch.

DIR/train/CLASS/*  and  DIR/test/CLASS/* or DIR/val/CLASS/*        or, without DIR/train:        DIR/CLASS/*
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from lowmem.data.config import ImageFolderData
from lowmem.data.images import DecodedRows, ImageSet, Part, check_labels, pillow, square
from lowmem.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def open_folder(config: ImageFolderData) -> ImageSet:
    """Lists the files.

    Raises DataError: no folder, a class without training images, or no test images; `load`'s rows: an
    unreadable image.
    """
    pillow("data.name: 'image_folder'")
    root, side = Path(config.path), config.image_size
    split = (root / "train").is_dir()
    classes = _classes(root / "train" if split else root)
    if split:
        test_folder = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
        unknown = sorted(set(_classes(test_folder)) - set(classes))
        if unknown:
            raise DataError(
                f"{test_folder / unknown[0]}: no such class in {root / 'train'}; allowed: its {len(classes)} folders; add it there"
            )
        files = {
            part: _files(root, folder, classes)
            for part, folder in {"train": root / "train", "test": test_folder}.items()
        }
    else:
        every = [
            (name, label, in_test_part(name, config.test_fraction))
            for name, label in _files(root, root, classes)
        ]
        files = {
            part: [(name, label) for name, label, test in every if test == (part == "test")]
            for part in ("train", "test")
        }
    labels = {part: np.array([label for _, label in found], np.int64) for part, found in files.items()}
    present = set(labels["train"].tolist())
    for label, name in enumerate(classes):
        if label not in present:
            cure = (
                "add some, or remove the folder"
                if split
                else "add some, remove the folder, or lower data.test_fraction"
            )
            raise DataError(
                f"{root}: class {name} has no training image; allowed: at least one ({', '.join(SUFFIXES)}); {cure}"
            )
    check_labels(
        labels, {part: len(found) for part, found in files.items()}, {part: str(root) for part in files}
    )

    def load(part: str) -> Part:
        paths = [name for name, _ in files[part]]
        images = DecodedRows(
            len(paths), lambda index: square(root / paths[index], side, str(root / paths[index]))
        )
        return {"image": images, "label": labels[part]}

    return ImageSet((3, side, side), len(classes), lambda: (load("train"), load("test")))


def in_test_part(name: str, test_fraction: float) -> bool:
    """Whether a file belongs to the test part: by its name alone, so that it stays there whatever is added to
    the folder.
    """
    return (
        int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big")
        < test_fraction * 2**64
    )


def _classes(folder: Path) -> list[str]:
    """Its folders' names, in order."""
    try:
        names = sorted(
            entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
        )
    except OSError as problem:
        raise DataError(
            f"data.path: {folder}: {problem.strerror}; give a folder with one folder of images for each class"
        ) from None
    if not names:
        raise DataError(
            f"data.path: {folder}: found no folder in it; allowed: one for each class; sort the images into such"
        )
    return names


def _files(root: Path, folder: Path, classes: list[str]) -> list[tuple[str, int]]:
    """(name relative to `root`, label) of every image below folder/CLASS, in the order of names."""
    found = []
    for label, name in enumerate(classes):
        for where, _, names in os.walk(folder / name):
            below = Path(where).relative_to(root).as_posix()
            found += [
                (f"{below}/{file}", label)
                for file in names
                if file.lower().endswith(SUFFIXES) and not file.startswith(".")
            ]
    return sorted(found)
