"""`data.name: image_folder`: images in folders, one folder for each class.

DIR/train/CLASS/*  and  DIR/test/CLASS/* or DIR/val/CLASS/*
DIR/CLASS/*             if there is no DIR/train; `test_fraction` of the images is then the test part

Classes are numbered in the order of their names. A batch opens its own images.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

import numpy as np

from lowmem.data.image_source import SquareImages, TestFraction
from lowmem.data.images import Array, DecodedRows, ImageSet, Part, check_labels, pillow, square
from lowmem.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
Files = list[tuple[str, int]]  # (name relative to the root, label)


class ImageFolderData(SquareImages):
    name: Literal["image_folder"]
    path: str
    test_fraction: TestFraction = 0.1

    def _open(self) -> ImageSet:
        """Lists the files.

        Raises DataError when there is no folder, a class without training images, or no test image. The rows
        that `load` returns raise it for an image that cannot be read.
        """
        pillow("data.name: 'image_folder'")
        root, side = Path(self.path), self.image_size
        split = (root / "train").is_dir()
        classes = _classes(root / "train" if split else root)
        files = _split_files(root, classes) if split else _drawn_files(root, classes, self.test_fraction)
        labels = {part: np.array([label for _, label in found], np.int64) for part, found in files.items()}
        _require_training_images(root, classes, labels["train"], split)
        counts = {part: len(found) for part, found in files.items()}
        check_labels(labels, counts, dict.fromkeys(files, str(root)))

        def load(part: str) -> Part:
            paths = [str(root / name) for name, _ in files[part]]
            images = DecodedRows(len(paths), lambda index: square(paths[index], side, paths[index]))
            return {"image": images, "label": labels[part]}

        return ImageSet((3, side, side), len(classes), lambda: (load("train"), load("test")))


def in_test_part(name: str, test_fraction: float) -> bool:
    """Whether a file belongs to the test part.

    Its name alone decides, so it stays in its part whatever is added to the folder.
    """
    first_bytes = hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8]
    return int.from_bytes(first_bytes, "big") < test_fraction * 2**64


def _split_files(root: Path, classes: list[str]) -> dict[str, Files]:
    """The files of root/train, and of root/test or root/val."""
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
    unknown = sorted(set(_classes(test)) - set(classes))
    if unknown:
        raise DataError(
            f"{test / unknown[0]}: no such class in {root / 'train'}; "
            f"allowed: its {len(classes)} folders; add it there"
        )
    return {"train": _files(root, root / "train", classes), "test": _files(root, test, classes)}


def _drawn_files(root: Path, classes: list[str], test_fraction: float) -> dict[str, Files]:
    """The files of root/CLASS, each in the part that its name decides."""
    parts: dict[str, Files] = {"train": [], "test": []}
    for name, label in _files(root, root, classes):
        parts["test" if in_test_part(name, test_fraction) else "train"].append((name, label))
    return parts


def _require_training_images(root: Path, classes: list[str], labels: Array, split: bool) -> None:
    present = set(labels.tolist())
    for label, name in enumerate(classes):
        if label not in present:
            cure = "or remove the folder" if split else "remove the folder, or lower data.test_fraction"
            raise DataError(
                f"{root}: class {name} has no training image; "
                f"allowed: at least one ({', '.join(SUFFIXES)}); add some, {cure}"
            )


def _classes(folder: Path) -> list[str]:
    """The names of the folders in a folder, in order. Raises DataError when there is none."""
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
            f"data.path: {folder}: found no folder in it; "
            "allowed: one for each class; sort the images into such"
        )
    return names


def _files(root: Path, folder: Path, classes: list[str]) -> Files:
    """Every image below folder/CLASS, in the order of names."""
    found: Files = []
    for label, name in enumerate(classes):
        for where, _, names in os.walk(folder / name):
            below = Path(where).relative_to(root).as_posix()
            found += [
                (f"{below}/{file}", label)
                for file in names
                if file.lower().endswith(SUFFIXES) and not file.startswith(".")
            ]
    return sorted(found)
