"""Data sets whose every batch is a function of (seed, step): nothing to save, and a resumed run draws what an
unbroken one would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from lowmem.data.augment import Augment
from lowmem.data.config import (
    AugmentConfig,
    DataConfig,
    DeclaredImages,
    DigitsData,
    HuggingfaceImages,
    IdxImagesData,
    ImageFolderData,
    LatentArraysData,
    NpzImagesData,
    TextConfig,
)
from lowmem.data.folder import open_folder
from lowmem.data.huggingface import open_huggingface
from lowmem.data.idx import open_idx
from lowmem.data.images import ImageSet, Part, bytes_to_float, same_shape
from lowmem.data.latents import open_latents
from lowmem.data.npz import open_npz
from lowmem.data.text import load_text
from lowmem.data.tokenizer import Tokenizer
from lowmem.errors import ConfigError, DataError
from lowmem.units import MIB

DIGITS_TRAIN, DIGITS_TEST = 1437, 360
DIGITS_SPLIT_SEED = 0  # the split (stratified by class) is part of the data set, not of the run
DIGITS_LEVEL = 255 / 16  # its pixels are 0 to 16
DIGITS_BYTES = 45 * MIB  # measured: the import of scikit-learn; the digits themselves are 0.1 MiB


@dataclass(frozen=True)
class DataSpec:
    """What a model must know of the data before they are read. `image_shape` = (channels, height, width)."""

    image_shape: tuple[int, int, int] | None = None
    num_classes: int | None = None
    vocab_size: int | None = None
    seq_len: int | None = None  # tokens
    host_bytes: int = field(
        default=0, compare=False
    )  # held in memory while training; text and folders of images are read where they lie


ArrayBatch = dict[str, "np.ndarray[Any, Any]"]


class Dataset:
    """Rows of equal length by name, in a training and a test part. A batch's rows go through `augment`
    (training only), then `convert`.

    Samples are dealt from one endless row of epochs, each a fresh permutation; step s takes the s-th handful
    of it.
    """

    def __init__(
        self,
        train: Part,
        test: Part,
        convert: Callable[[ArrayBatch], ArrayBatch] = dict,
        augment: Augment | None = None,
    ) -> None:
        self._train, self._test, self._convert, self._augment = train, test, convert, augment
        self.num_train, self.num_test = (len(next(iter(part.values()))) for part in (train, test))
        self._permutation: tuple[tuple[int, int], np.ndarray[Any, Any]] | None = None

    def batch(self, seed: int, step: int, batch_size: int) -> ArrayBatch:
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        rows = np.concatenate(
            [
                self._epoch(seed, int(epoch))[
                    positions[positions // self.num_train == epoch] % self.num_train
                ]
                for epoch in np.unique(positions // self.num_train)
            ]
        )
        batch = {name: part[rows] for name, part in self._train.items()}
        if self._augment is not None:
            batch["image"] = self._augment(batch["image"], seed, step)
        return self._convert(batch)

    def test_batches(self, batch_size: int) -> Iterator[ArrayBatch]:
        for start in range(0, self.num_test, batch_size):
            yield self._convert({name: part[start : start + batch_size] for name, part in self._test.items()})

    def _epoch(self, seed: int, epoch: int) -> np.ndarray[Any, Any]:
        if self._permutation is None or self._permutation[0] != (seed, epoch):
            self._permutation = (
                (seed, epoch),
                np.random.default_rng([seed, epoch]).permutation(self.num_train),
            )
        return self._permutation[1]


def describe_data(
    data: DataConfig, seq_len: int | None = None, tokenizer: Tokenizer | None = None
) -> DataSpec:
    """Shapes and counts: as declared, or else from headers; a text is opened, and on its first use tokenised.

    Raises DataError when the data are missing or their headers wrong, ConfigError when the recipe does not
    say enough.
    """
    if isinstance(data, DigitsData):
        return DataSpec(image_shape=(1, 8, 8), num_classes=10, host_bytes=DIGITS_BYTES)
    if isinstance(data, TextConfig):
        length, declared = _required(seq_len), getattr(data, "vocab_size", None)
        return DataSpec(vocab_size=declared or load_text(data, length, tokenizer).vocab_size, seq_len=length)
    if isinstance(data, DeclaredImages):
        if data.known_shape and data.num_classes:
            channels, height, width = data.known_shape
            return DataSpec(image_shape=(channels, height, width), num_classes=data.num_classes)
        images = _open_images(data)
        return DataSpec(
            image_shape=images.image_shape, num_classes=images.num_classes, host_bytes=images.host_bytes
        )
    raise _custom()


def load_data(
    data: DataConfig, seq_len: int | None = None, tokenizer: Tokenizer | None = None, augmented: bool = True
) -> Dataset:
    """`tokenizer`: another than the recipe's, for its text. `augmented`: with the recipe's `data.augment`,
    which evaluation does without.

    Raises DataError when the data cannot be read, or are not what the recipe says.
    """
    if isinstance(data, TextConfig):
        return cast(
            Dataset, load_text(data, _required(seq_len), tokenizer)
        )  # the same names, though no arrays of samples
    config = getattr(data, "augment", AugmentConfig())
    augment = Augment(config) if augmented and (config.flip or config.rand_augment_ops) else None
    if isinstance(data, DigitsData):
        return _digits(augment)
    if isinstance(data, DeclaredImages):
        train, test = _open_images(data).load()
        return Dataset(
            train,
            test,
            _scaled(data.scale) if isinstance(data, LatentArraysData) else bytes_to_float,
            augment,
        )
    raise _custom()


def _open_images(data: DeclaredImages) -> ImageSet:
    """Raises DataError where what is found is not what is declared."""
    if isinstance(data, IdxImagesData):
        images = open_idx(data)
    elif isinstance(data, NpzImagesData):
        images = open_npz(data)
    elif isinstance(data, ImageFolderData):
        images = open_folder(data)
    elif isinstance(data, HuggingfaceImages):
        images = open_huggingface(data)
    else:
        assert isinstance(data, LatentArraysData)
        images = open_latents(data)
    if data.image_shape:
        same_shape(
            images.image_shape,
            data.image_shape,
            "data.image_shape",
            "as declared; declare what is there, or leave it out",
        )
    if data.num_classes not in (None, images.num_classes):
        found = (
            f"data.num_classes: found {images.num_classes} classes; allowed: {data.num_classes}, as declared"
        )
        raise DataError(f"{found}; declare what is there, or leave it out")
    return images


def _scaled(scale: float) -> Callable[[ArrayBatch], ArrayBatch]:
    return lambda batch: {**batch, "image": batch["image"].astype(np.float32, order="C") * np.float32(scale)}


def _custom() -> ConfigError:
    return ConfigError(
        "data.name: 'custom' data are given from Python: Trainer(build_model, plan, run_dir).fit(batches)"
    )


def _required(seq_len: int | None) -> int:
    if seq_len is None:
        raise ConfigError("train.seq_len: missing; text needs the number of tokens of a sequence; add it")
    return seq_len


def _digits(augment: Augment | None) -> Dataset:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise DataError(
            "data.name: 'digits' comes with scikit-learn, which is not installed; install the extra: pip install 'lowmem[data]'"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 1, 8, 8) * DIGITS_LEVEL).astype(np.uint8)
    if len(images) != DIGITS_TRAIN + DIGITS_TEST:
        raise DataError(
            f"data.name: 'digits' has {len(images)} images; expected {DIGITS_TRAIN + DIGITS_TEST}; scikit-learn's copy has changed"
        )
    rows = train_test_split(
        np.arange(len(images)), test_size=DIGITS_TEST, stratify=labels, random_state=DIGITS_SPLIT_SEED
    )
    train, test = ({"image": images[part], "label": labels[part].astype(np.int64)} for part in rows)
    return Dataset(train, test, _digits_to_float, augment)


def _digits_to_float(batch: Mapping[str, Any]) -> ArrayBatch:
    """Bytes 0 to 255 -> the data set's own 17 levels -> float32 -1 to 1."""
    return {
        **batch,
        "image": np.rint(batch["image"] / DIGITS_LEVEL).astype(np.float32) / np.float32(8) - np.float32(1),
    }
