"""What every kind of image data shares: the keys that declare shapes and classes, and the check against them.

A kind of images is a subclass with its own keys and one method, `_open`, which finds and checks the files.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from lowmem.data.augment import Augment, AugmentConfig
from lowmem.data.datasets import ArrayBatch, DataSection, Dataset, DataSpec
from lowmem.data.identity import Classes, DataIdentity, Fingerprint, ImageShape, Side
from lowmem.data.images import ImageSet, bytes_to_float, check_extent, same_shape
from lowmem.data.tokenizer import Tokenizer
from lowmem.errors import DataError
from lowmem.units import counted

MEASURED = 10_000  # training images that tell the scale of all
LEAST_VARIANCE = 1e-6  # of pixels in [-1, 1]: one level of 256 is 8e-3
TestFraction = Annotated[float, Field(gt=0, lt=1)]


class ImageSource(DataSection):
    """Images with labels."""

    @abstractmethod
    def _open(self) -> ImageSet:
        """Finds the images. Raises DataError when they cannot be used."""

    def open(self) -> ImageSet:
        """Finds the images. Raises DataError when they cannot be used or differ from what is declared."""
        images = self._open()
        check_extent(images)
        return images

    def image_scale(self, images: ImageSet) -> float | None:
        """What brings the training images to a standard deviation of 1; None: they stay as they are."""
        return None

    def to_floats(self, batch: ArrayBatch) -> ArrayBatch:
        """The batch with `image` as the model takes it: float32, by default from bytes to -1 ... 1."""
        return bytes_to_float(batch)

    def augmentation(self) -> Augment | None:
        """What changes training images, or None."""
        return None

    def describe(self, seq_len: int | None, tokenizer: Tokenizer | None) -> DataSpec:
        images = self.open()
        return DataSpec(
            images.image_shape,
            images.num_classes,
            host_bytes=images.host_bytes,
            num_test=images.num_test,
        )

    def load(self, seq_len: int | None, tokenizer: Tokenizer | None, augmented: bool) -> Dataset:
        augment = self.augmentation() if augmented else None
        images = self.open()
        train, test = images.load()
        return Dataset(train, test, self.to_floats, augment, images.warnings)

    def identify(self, seq_len: int | None) -> DataIdentity:
        images, mark = self.open(), Fingerprint()
        images.mark(mark)
        return mark.identity(
            image_shape=list(images.image_shape),
            num_classes=images.num_classes,
            class_names=images.class_names,
            image_scale=self.image_scale(images),
        )


class DeclaredImages(ImageSource):
    """Images from files. A recipe that declares their shape and classes is planned without the files."""

    image_shape: ImageShape | None = None
    num_classes: Classes | None = None

    @property
    def known_shape(self) -> list[int] | None:
        """(C, H, W), if the section alone says it."""
        return self.image_shape

    def describe(self, seq_len: int | None, tokenizer: Tokenizer | None) -> DataSpec:
        if self.known_shape and self.num_classes:
            channels, height, width = self.known_shape
            return DataSpec((channels, height, width), self.num_classes)
        return super().describe(seq_len, tokenizer)

    def open(self) -> ImageSet:
        images, cure = super().open(), "declare what is there, or leave it out"
        if self.image_shape:
            same_shape(images.image_shape, self.image_shape, "data.image_shape", f"as declared; {cure}")
        if self.num_classes not in (None, images.num_classes):
            raise DataError(
                f"data.num_classes: found {counted(images.num_classes, 'class', 'classes')}; "
                f"allowed: {self.num_classes}, as declared; {cure}"
            )
        return images


class PixelSource(ImageSource):
    """Images of bytes, in 1 or 3 channels."""

    augment: AugmentConfig = AugmentConfig()
    # Of images that are targets. measured: y has a standard deviation of noise.sigma_data over the training
    # images. None: y is sigma_data times pixels in [-1, 1].
    scale: Literal["measured"] | None = None

    def augmentation(self) -> Augment | None:
        return self.augment.made()

    def image_scale(self, images: ImageSet) -> float | None:
        return None if self.scale is None else measured_scale(images, self.to_floats)


def measured_scale(images: ImageSet, to_floats: Callable[[ArrayBatch], ArrayBatch]) -> float:
    """1 over the standard deviation of all pixels of the training images, or of MEASURED evenly spaced ones,
    to six digits. Raises DataError where all pixels are alike.
    """
    rows, _ = images.load()
    count = len(rows["image"])
    places = np.unique(np.linspace(0, count - 1, min(count, MEASURED)).astype(np.int64))
    number, total, squares = 0, 0.0, 0.0
    for chunk in np.array_split(places, max(len(places) // 256, 1)):
        values = to_floats({"image": rows["image"][chunk]})["image"].astype(np.float64)
        number, total, squares = number + values.size, total + values.sum(), squares + np.square(values).sum()
    variance = squares / number - (total / number) ** 2
    if not variance > LEAST_VARIANCE:
        raise DataError(
            f"data.scale: found training images with a variance of {variance:.1e}; allowed with 'measured': "
            "pixels that differ; leave data.scale out"
        )
    return float(f"{variance**-0.5:.6g}")


class PixelImages(DeclaredImages, PixelSource):
    """Pixels from files."""


class SquareImages(PixelImages):
    """Images of any size. Each is made RGB, cut to the square in its middle, and resized to `image_size`."""

    image_size: Side  # pixels

    @property
    def known_shape(self) -> list[int]:
        return [3, self.image_size, self.image_size]

    @model_validator(mode="after")
    def _square(self) -> SquareImages:
        if self.image_shape not in (None, self.known_shape):
            raise ValueError(
                f"image_shape: found {self.image_shape}; "
                f"allowed with image_size {self.image_size}: {self.known_shape}; leave it out"
            )
        return self
