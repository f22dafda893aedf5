"""`data.name: huggingface`: data sets that the library `datasets` knows by name, as images or as text.

The library finds, downloads and caches them. Its Arrow files are mapped into memory. No code that comes with
a data set is run: the library stopped doing so in version 4, and images are decoded here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lowmem.data.cache import cache_dir, cached, digest, file_facts
from lowmem.data.identity import Fingerprint
from lowmem.data.image_source import SquareImages
from lowmem.data.images import Array, DecodedRows, ImageSet, Part, check_labels, pillow, square
from lowmem.data.packages import imported
from lowmem.data.text import TokenisedText
from lowmem.errors import DataError
from lowmem.schema import Section


class HuggingfaceSource(Section):
    """The keys that name a data set, on the library's hub or in a folder."""

    name: Literal["huggingface"]
    dataset: str
    subset: str | None = None
    revision: str | None = None  # a commit of the hub's repository; None = the newest
    train_split: str = "train"  # a share works too, as in train[:90%]
    test_split: str = "test"

    @property
    def remote(self) -> bool:
        return True

    @property
    def packages(self) -> tuple[str, ...]:
        return ("datasets",)

    @property
    def splits(self) -> dict[str, str]:
        return {"train": self.train_split, "test": self.test_split}

    def where(self, split: str) -> str:
        """The words with which a message about a split begins."""
        return f"data.dataset: '{self.dataset}', split '{split}'"

    def open_split(self, split: str, columns: tuple[str, ...]) -> Any:
        """The library's own Dataset. Raises DataError when it cannot be opened or has no such columns."""
        library = _library()
        try:
            found = library.load_dataset(self.dataset, self.subset, split=split, revision=self.revision)
        except Exception as problem:  # no network, no such data set, subset or split: errors of many kinds
            subset = f", subset '{self.subset}'" if self.subset else ""
            raise DataError(
                f"data.dataset: '{self.dataset}'{subset}, split '{split}': cannot be opened "
                f"({_line(problem)}); check the names and the network, or download it first"
            ) from None
        for column in columns:
            if column not in found.column_names:
                allowed = ", ".join(found.column_names)
                raise DataError(
                    f"{self.where(split)}: no column '{column}'; allowed: {allowed}; name one of them"
                )
        return found


class HuggingfaceImages(HuggingfaceSource, SquareImages):
    kind: Literal["images"]
    image_column: str = "image"
    label_column: str = "label"

    def _open(self) -> ImageSet:
        """Opens both splits and reads their labels.

        Raises DataError. The rows that `load` returns raise it for an image that cannot be read.
        """
        pillow("data.name: 'huggingface', kind: images")
        as_files, side = _library().Image(decode=False), self.image_size
        columns = (self.image_column, self.label_column)
        splits = {part: self.open_split(split, columns) for part, split in self.splits.items()}
        where = {part: self.where(split) for part, split in self.splits.items()}
        labels = {part: np.asarray(split[self.label_column][:]) for part, split in splits.items()}
        counts = {part: len(split) for part, split in splits.items()}
        num_classes = check_labels(labels, counts, where)
        try:
            files = {part: split.cast_column(self.image_column, as_files) for part, split in splits.items()}
        except Exception as problem:  # another library's errors are of many kinds
            raise DataError(
                f"{where['train']}: column {self.image_column} holds no images ({_line(problem)}); "
                "name the column that does"
            ) from None

        def load(part: str) -> Part:
            def read(index: int) -> Array:
                stored = files[part][index][self.image_column] or {}
                return square(
                    stored.get("bytes") or stored.get("path"), side, f"{where[part]}, image {index}"
                )

            return {"image": DecodedRows(len(files[part]), read), "label": labels[part].astype(np.int64)}

        def mark(fingerprint: Fingerprint) -> None:
            for part, split in splits.items():
                fingerprint.array(f"{part} labels", labels[part])
                for number, file in enumerate(split.cache_files):
                    fingerprint.file(f"{part} rows {number}", Path(file["filename"]))
                fingerprint.num_items += counts[part]

        return ImageSet(
            (3, side, side),
            num_classes,
            lambda: (load("train"), load("test")),
            mark,
            class_names=self._names(splits["train"]),
            num_test=counts["test"],
        )

    def _names(self, split: Any) -> list[str] | None:
        """The classes' names, where the library knows them."""
        names = getattr(getattr(split, "features", {}).get(self.label_column), "names", None)
        return None if names is None else list(names)


class HuggingfaceText(HuggingfaceSource, TokenisedText):
    """The documents of a split, joined with newlines, are its text."""

    kind: Literal["text"]
    text_column: str = "text"

    @property
    def source(self) -> str:
        return f"data.dataset: '{self.dataset}'"

    def files(self) -> list[Path]:
        """Two files of the cache, the train split's text and the test split's."""
        return [self._file(split) for split in self.splits.values()]

    def _file(self, split_name: str) -> Path:
        split = self.open_split(split_name, (self.text_column,))

        def documents() -> Iterator[bytes]:
            for number, document in enumerate(split[self.text_column]):
                if not isinstance(document, str):
                    raise DataError(
                        f"{self.where(split_name)}: {self.text_column} of row {number} is "
                        f"{type(document).__name__}; allowed: text; name such a column"
                    )
                yield ("\n" * (number > 0) + document).encode()

        arrow = file_facts(Path(file["filename"]) for file in split.cache_files)
        names = [self.dataset, self.subset, self.revision, split_name, self.text_column]
        return cached(cache_dir() / f"{digest('huggingface', [*names, len(split), arrow])}.txt", documents)


def _library() -> Any:
    return imported("datasets", "data.name: 'huggingface'")


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())
