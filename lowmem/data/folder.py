"""`data.name: image_folder`: images in folders, one folder for each class.

DIR/train/CLASS/*  and  DIR/test/CLASS/* or DIR/val/CLASS/*
DIR/**                  with `classes: none`: all pictures are of one class, to be drawn
DIR/CLASS/*             if no folder lies in DIR/train; `test_fraction` of the images is then the test part

Classes are numbered in the order of their names. A class's folder may hold folders and links to folders. A
file is a picture by its suffix, or by how it begins if it has none. What is not used is counted and said. A
batch opens its own images.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from lowmem.data.identity import MENDED, Fingerprint
from lowmem.data.image_source import SquareImages, TestFraction
from lowmem.data.images import Array, DecodedRows, ImageSet, Part, check_labels, pillow, square
from lowmem.data.opening import is_folder, open_file, reaching
from lowmem.errors import DataError
from lowmem.files import printable
from lowmem.units import counted

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".webp"),
)
# How the files of pictures begin.
BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")
ONE_CLASS = "all"  # of pictures that are not sorted
TEST_NAMES = ("test", "val")
GIVE = "give a folder with one folder of images for each class"
Files = list[tuple[str, int]]  # (name relative to the root, label)


class ImageFolderData(SquareImages):
    name: Literal["image_folder"]
    path: str
    test_fraction: TestFraction = 0.1
    classes: Literal["folders", "none"] = "folders"

    @property
    def packages(self) -> tuple[str, ...]:
        return ("PIL",)

    @property
    def class_names(self) -> list[str]:
        root = Path(self.path)
        if self.classes == "none":
            return [ONE_CLASS]
        return _classes(root / "train" if _is_split(root) else root)

    def _open(self) -> ImageSet:
        """Lists the files.

        Raises DataError when there is no folder, a class without training images, or no test image. The rows
        that `load` returns raise it for an image that cannot be read.
        """
        pillow("data.name: 'image_folder'")
        root, side, left_out = Path(self.path), self.image_size, LeftOut()
        unsorted = self.classes == "none"
        split, classes = not unsorted and _is_split(root), self.class_names
        if unsorted:
            files = _drawn(_pictures(root, root, 0, left_out), self.test_fraction)
        elif split:
            files = _split_files(root, classes, left_out)
        else:
            files = _drawn_files(root, classes, self.test_fraction, left_out)
        labels = {part: np.array([label for _, label in found], np.int64) for part, found in files.items()}
        _require_training_images(root, classes, labels["train"], split)
        counts = {part: len(found) for part, found in files.items()}
        check_labels(labels, counts, dict.fromkeys(files, str(root)))

        def load(part: str) -> Part:
            paths = [str(root / name) for name, _ in files[part]]
            images = DecodedRows(len(paths), lambda index: square(paths[index], side, paths[index]))
            return {"image": images, "label": labels[part]}

        def mark(fingerprint: Fingerprint) -> None:
            fingerprint.fact(classes)
            for part, found in files.items():
                _mark_files(fingerprint, root, part, found)

        return ImageSet(
            (3, side, side),
            len(classes),
            lambda: (load("train"), load("test")),
            mark,
            class_names=classes,
            num_test=counts["test"],
            warnings=left_out.lines(root),
        )


class LeftOut:
    """Files that are not used: for each reason how many, and the first."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self._found.setdefault(reason, []).append(name)

    def lines(self, root: Path) -> tuple[str, ...]:
        """One line, or none."""
        if not self._found:
            return ()
        said = [f"{len(names)} {reason} ({printable(min(names))})" for reason, names in self._found.items()]
        return (f"{printable(root)}: left out, with one example each: {', '.join(said)}",)


def _mark_files(fingerprint: Fingerprint, root: Path, part: str, files: Files) -> None:
    """Names, sizes and times: to read all pictures would take too long. Raises DataError."""
    for name, label in files:
        where = f"data: {printable(root / name)}"
        with reaching(where, MENDED):
            found = os.stat(root / name)
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{where}: a pipe or a device, where a picture should be; remove it")
        fingerprint.fact(part, name, label, found.st_size, found.st_mtime_ns)
        fingerprint.num_bytes += found.st_size
    fingerprint.num_items += len(files)


def in_test_part(name: str, test_fraction: float) -> bool:
    """Whether a file belongs to the test part.

    Its name alone decides, so it stays in its part whatever is added to the folder.
    """
    first_bytes = hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8]
    return int.from_bytes(first_bytes, "big") < test_fraction * 2**64


def _is_split(root: Path) -> bool:
    """Whether DIR/train is the training part.

    It is a class called train if pictures lie right in it, and no folders, or no test part beside it.
    """
    if not is_folder(root / "train", f"data.path: {printable(root)}", GIVE):
        return False
    entries = _entries(root / "train")
    is_class = any(map(_is_picture, entries))
    return not is_class or (any(entry.is_dir() for entry in entries) and bool(_test_folders(root)))


def _test_folders(root: Path) -> list[Path]:
    where = f"data.path: {printable(root)}"
    return [root / name for name in TEST_NAMES if is_folder(root / name, where, GIVE)]


def _split_files(root: Path, classes: list[str], left_out: LeftOut) -> dict[str, Files]:
    """The files of root/train, and of root/test or root/val."""
    beside = _test_folders(root)
    if not beside:
        raise DataError(
            f"data.path: {printable(root)}: found train with folders in it, and neither test nor val "
            "beside it; "
            "allowed: a split in two, or pictures right in the folder of a class called train; add the one, "
            "or move the other"
        )
    test = beside[0]
    unknown = sorted(set(_classes(test)) - set(classes))
    if unknown:
        raise DataError(
            f"{printable(test / unknown[0])}: no such class in {printable(root / 'train')}; "
            f"allowed: its {counted(len(classes), 'folder')}; add it there"
        )
    for entry in _entries(root):
        if entry.name not in ("train", test.name):
            left_out.add("beside train and test", entry.name)
    return {
        "train": _files(root, root / "train", classes, left_out),
        "test": _files(root, test, classes, left_out),
    }


def _drawn_files(root: Path, classes: list[str], test_fraction: float, left_out: LeftOut) -> dict[str, Files]:
    """The files of root/CLASS, each in the part that its name decides."""
    return _drawn(_files(root, root, classes, left_out), test_fraction)


def _drawn(files: Files, test_fraction: float) -> dict[str, Files]:
    parts: dict[str, Files] = {"train": [], "test": []}
    for name, label in sorted(files):
        parts["test" if in_test_part(name, test_fraction) else "train"].append((name, label))
    return parts


def _require_training_images(root: Path, classes: list[str], labels: Array, split: bool) -> None:
    present = set(labels.tolist())
    for label, name in enumerate(classes):
        if label not in present:
            cure = "or remove the folder" if split else "remove the folder, or lower data.test_fraction"
            raise DataError(
                f"{printable(root)}: class {printable(name)} has no training image; "
                f"allowed: at least one ({', '.join(SUFFIXES)}); add some, {cure}"
            )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with reaching(f"data.path: {printable(folder)}", GIVE), os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _classes(folder: Path) -> list[str]:
    """The names of the folders in a folder, in order. Raises DataError when there is none."""
    names = [entry.name for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith(".")]
    if not names:
        raise DataError(
            f"data.path: {printable(folder)}: found no folder in it; "
            "allowed: one for each class; sort the images into such"
        )
    return names


def _files(root: Path, folder: Path, classes: list[str], left_out: LeftOut) -> Files:
    """Every image below folder/CLASS, in the order of names."""
    found: Files = []
    present = [entry.name for entry in _entries(folder)]
    for name in present:
        if name not in classes:
            left_out.add("in no class's folder", (folder / name).relative_to(root).as_posix())
    for label, name in enumerate(classes):
        if name in present:
            found += _pictures(root, folder / name, label, left_out)
    return sorted(found)


def _pictures(root: Path, folder: Path, label: int, left_out: LeftOut) -> Files:
    """Every image below a folder."""
    found: Files = []
    for entry in _below(folder, set()):
        path = Path(entry.path).relative_to(root).as_posix()
        if entry.name.startswith("."):
            left_out.add("hidden", path)
        elif _is_picture(entry):
            found.append((path, label))
        else:
            left_out.add("not pictures", path)
    return found


def sorted_classes(root: Path) -> list[str]:
    """The classes that a folder's own folders are, none where pictures lie in no folder of it."""
    folder = root / "train" if _is_split(root) else root
    return [entry.name for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith(".")]


def some_pictures(root: Path, most: int) -> list[Path]:
    """The first pictures below a folder."""
    pictures = (Path(entry.path) for entry in _below(root, set()) if _is_picture(entry))
    return list(itertools.islice(pictures, most))


def _below(folder: Path, seen: set[tuple[int, int]]) -> Iterator[os.DirEntry[str]]:
    """The files of a folder and of all folders in it, links followed, each folder once."""
    with reaching(f"data.path: {printable(folder)}", GIVE):
        status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:  # a link to where we are or were
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _below(Path(entry.path), seen)
        else:
            yield entry


def _is_picture(entry: os.DirEntry[str]) -> bool:
    """By its suffix. By how it begins if it has none."""
    if entry.is_dir():
        return False
    if "." in entry.name.strip("."):
        return entry.name.lower().endswith(SUFFIXES)
    if not entry.is_file():
        return False
    with open_file(entry.path, f"data.path: {printable(entry.path)}", MENDED) as file:
        start = file.read(16)
    bitmap = start[:2] == b"BM" and start[6:10] == bytes(4)
    plain = start[:1] == b"P" and start[1:2] in b"123456" and start[2:3].isspace()
    return start.startswith(BEGINNINGS) or bitmap or plain or (start[:4], start[8:12]) == (b"RIFF", b"WEBP")
