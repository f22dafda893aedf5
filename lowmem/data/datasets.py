"""What every kind of data has in common: a section of a recipe, what a model must know of it, and batches.

A kind of data is a subclass of `DataSection` in a file of its own. `config.py` lists them all. Every batch is
a function of (seed, step). A run therefore saves nothing of its data, and a resumed run draws the batches
that an unbroken run would have drawn.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lowmem.data.augment import Augment
from lowmem.data.identity import DataIdentity
from lowmem.data.images import Array, Part
from lowmem.data.tokenizer import Tokenizer
from lowmem.schema import Section

ArrayBatch = dict[str, Array]


@dataclass(frozen=True)
class DataSpec:
    """What a model must know of the data before they are read."""

    image_shape: tuple[int, int, int] | None = None  # channels, height, width
    num_classes: int | None = None
    vocab_size: int | None = None
    seq_len: int | None = None  # tokens
    # of images that are targets; as it was measured, once a run begins (`data.scale`)
    image_scale: float = field(default=1.0, compare=False)
    # Held in memory during training. Texts and folders of images stay on disk and count as 0.
    host_bytes: int = field(default=0, compare=False)
    num_test: int | None = field(default=None, compare=False)  # samples of the test part, where known


class Dataset:
    """Rows by name, all names equally long, in a training part and a test part.

    A training batch passes through `augment`, then `convert`; a test batch passes through `convert` alone.
    Training rows come from an endless sequence of epochs. Each epoch is a fresh permutation of all rows, and
    step s takes the s-th `batch_size` rows of the sequence. `warnings` say what lies there and is not used.
    """

    def __init__(
        self,
        train: Part,
        test: Part,
        convert: Callable[[ArrayBatch], ArrayBatch] = dict,
        augment: Augment | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        self.warnings = list(warnings)
        self._train, self._test, self._convert, self._augment = train, test, convert, augment
        self.num_train, self.num_test = (len(next(iter(part.values()))) for part in (train, test))
        self._permutation: tuple[tuple[int, int], Array] | None = None

    def unaugmented(self) -> Dataset:
        """The same rows, for an evaluation."""
        plain = copy.copy(self)
        plain._augment = None
        return plain

    def batch(self, seed: int, step: int, batch_size: int) -> ArrayBatch:
        """The training batch of a step: arrays whose first dimension is `batch_size`."""
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, places = positions // self.num_train, positions % self.num_train
        # A batch may reach over the end of an epoch.
        rows = np.concatenate(
            [self._epoch(seed, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        )
        batch = {name: part[rows] for name, part in self._train.items()}
        if self._augment is not None:
            batch["image"] = self._augment(batch["image"], seed, step)
        return self._convert(batch)

    def test_batches(self, batch_size: int) -> Iterator[ArrayBatch]:
        """The whole test part in order; the last batch may be smaller."""
        for start in range(0, self.num_test, batch_size):
            yield self._convert({name: part[start : start + batch_size] for name, part in self._test.items()})

    def _epoch(self, seed: int, epoch: int) -> Array:
        """The order of the rows in one epoch. The last one asked for is kept."""
        if self._permutation is None or self._permutation[0] != (seed, epoch):
            order = np.random.default_rng([seed, epoch]).permutation(self.num_train)
            self._permutation = ((seed, epoch), order)
        return self._permutation[1]


class DataSection(Section):
    """The `data` section of a recipe. Each kind of data is a subclass with its own keys and reader."""

    @property
    def metric_unit(self) -> Literal["char", "token"]:
        """What one token stands for: a character (or a byte of it), or whatever the tokenizer makes."""
        return "token"

    @property
    def decoded(self) -> bool:
        """Whether samples are pictures. If not, only a decoder of the user's makes pictures of them."""
        return True

    @property
    def remote(self) -> bool:
        """Whether reading the data can use the network."""
        return False

    @property
    def packages(self) -> tuple[str, ...]:
        """The modules that reading the data needs beside lowmem's own, of `packages.EXTRAS`."""
        return ()

    @property
    def class_names(self) -> list[str] | None:
        """The classes' names by label, where the data have such. Raises DataError as `load_data`."""
        return None

    @abstractmethod
    def identify(self, seq_len: int | None) -> DataIdentity:
        """See `identify_data`."""

    @abstractmethod
    def describe(self, seq_len: int | None, tokenizer: Tokenizer | None) -> DataSpec:
        """See `describe_data`."""

    @abstractmethod
    def load(self, seq_len: int | None, tokenizer: Tokenizer | None, augmented: bool) -> Dataset:
        """See `load_data`."""


def describe_data(
    data: DataSection, seq_len: int | None = None, tokenizer: Tokenizer | None = None
) -> DataSpec:
    """Shapes and counts as the recipe declares them. What it does not declare is read from the data.

    Images are then read as far as their headers and labels. A text is opened, and tokenised on its first use.
    `seq_len`: tokens of a sequence, needed for text. `tokenizer`: reads the text in place of the section's.
    Raises DataError when the data are missing or their headers are wrong, and ConfigError when the recipe
    does not say enough.
    """
    return data.describe(seq_len, tokenizer)


def load_data(
    data: DataSection,
    seq_len: int | None = None,
    tokenizer: Tokenizer | None = None,
    augmented: bool = True,
) -> Dataset:
    """The data, ready to give batches.

    `seq_len`: tokens of a sequence, needed for text. `tokenizer`: reads the text in place of the section's.
    `augmented`: whether training images are changed as `data.augment` says; an evaluation passes False.
    Raises DataError when the data cannot be read or differ from what the recipe declares, and ConfigError
    when the recipe does not say enough.
    """
    return data.load(seq_len, tokenizer, augmented)


def identify_data(data: DataSection, seq_len: int | None = None) -> DataIdentity:
    """What tells the data apart from all others, whatever path they lie at. Raises as `load_data`."""
    return data.identify(seq_len)
