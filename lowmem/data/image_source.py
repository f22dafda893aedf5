"""What every kind of image data shares: the keys that declare shapes and classes, and the check against them.

A kind of images is a subclass with its own keys and one method, `_open`, which finds and checks the files.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated

from pydantic import Field, model_validator

from lowmem.data.augment import Augment, AugmentConfig
from lowmem.data.datasets import ArrayBatch, DataSection, Dataset, DataSpec
from lowmem.data.identity import Classes, DataIdentity, Fingerprint, ImageShape, Side
from lowmem.data.images import ImageSet, bytes_to_float, check_extent, same_shape
from lowmem.data.tokenizer import Tokenizer
from lowmem.errors import DataError
from lowmem.units import counted

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


class PixelImages(DeclaredImages):
    """Images of bytes, in 1 or 3 channels."""

    augment: AugmentConfig = AugmentConfig()

    def augmentation(self) -> Augment | None:
        return self.augment.made()


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
