"""Data sets by name, through the library `datasets`: it finds, downloads and caches them; its Arrow files are
mapped, not read.

Nothing of a data set's own code is run: the library stopped doing so with version 4, and images are decoded
here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lowmem.data.cache import cache_dir, cached, digest, file_facts
from lowmem.data.config import HuggingfaceImages, HuggingfaceSource, HuggingfaceText
from lowmem.data.images import DecodedRows, ImageSet, Part, check_labels, pillow, square
from lowmem.errors import DataError


def open_huggingface(config: HuggingfaceImages) -> ImageSet:
    """Opens both splits and reads their labels. Raises DataError; `load`'s rows: on an unreadable image."""
    pillow("data.name: 'huggingface', kind: images")
    image_feature, side = _library().Image(decode=False), config.image_size
    splits = {part: _open(config, split) for part, split in _splits(config).items()}
    where = {
        part: f"data.dataset: '{config.dataset}', split '{split}'" for part, split in _splits(config).items()
    }
    for part, split in splits.items():
        for column in (config.image_column, config.label_column):
            _check_column(split, column, where[part])
    labels = {part: np.asarray(split[config.label_column][:]) for part, split in splits.items()}
    num_classes = check_labels(labels, {part: len(split) for part, split in splits.items()}, where)
    try:
        files = {
            part: split.cast_column(config.image_column, image_feature) for part, split in splits.items()
        }
    except Exception as problem:  # of another library: errors of many kinds
        raise DataError(
            f"{where['train']}: column {config.image_column} holds no images ({_line(problem)}); name the column that does"
        ) from None

    def load(part: str) -> Part:
        def read(index: int) -> Any:
            stored = files[part][index][config.image_column] or {}
            return square(stored.get("bytes") or stored.get("path"), side, f"{where[part]}, image {index}")

        return {"image": DecodedRows(len(files[part]), read), "label": labels[part].astype(np.int64)}

    return ImageSet((3, side, side), num_classes, lambda: (load("train"), load("test")))


def text_files(config: HuggingfaceText) -> list[Path]:
    """Two files of the cache: the train and the test split's documents, each joined with newlines."""
    return [_text_file(config, split) for split in _splits(config).values()]


def _text_file(config: HuggingfaceText, split_name: str) -> Path:
    split, where = _open(config, split_name), f"data.dataset: '{config.dataset}', split '{split_name}'"
    _check_column(split, config.text_column, where)

    def documents() -> Iterator[bytes]:
        for number, document in enumerate(split[config.text_column]):
            if not isinstance(document, str):
                raise DataError(
                    f"{where}: {config.text_column} of row {number} is {type(document).__name__}; allowed: text; name such a column"
                )
            yield ("\n" * (number > 0) + document).encode()

    arrow = file_facts(Path(file["filename"]) for file in split.cache_files)
    facts = [
        config.dataset,
        config.subset,
        config.revision,
        split_name,
        config.text_column,
        len(split),
        arrow,
    ]
    return cached(cache_dir() / f"{digest('huggingface', facts)}.txt", documents)


def _splits(config: HuggingfaceSource) -> dict[str, str]:
    return {"train": config.train_split, "test": config.test_split}


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        cure = "install the extra: pip install 'lowmem[huggingface]'"
        raise DataError(
            f"data.name: 'huggingface' needs the package datasets, which is not installed; {cure}"
        ) from None


def _open(config: HuggingfaceSource, split: str) -> Any:
    library = _library()
    try:
        return library.load_dataset(config.dataset, config.subset, split=split, revision=config.revision)
    except Exception as problem:  # no network, no such data set, subset or split: errors of many kinds
        where = (
            f"data.dataset: '{config.dataset}'"
            + (f", subset '{config.subset}'" if config.subset else "")
            + f", split '{split}'"
        )
        raise DataError(
            f"{where}: cannot be opened ({_line(problem)}); check the names and the network, or download it first"
        ) from None


def _check_column(split: Any, column: str, where: str) -> None:
    if column not in split.column_names:
        raise DataError(
            f"{where}: no column '{column}'; allowed: {', '.join(split.column_names)}; name one of them"
        )


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())
