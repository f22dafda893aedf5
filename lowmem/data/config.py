"""The `data` section of a recipe: one `Section` for each `data.name`, with its own keys.

Where shapes and counts are declared (`image_shape`, `num_classes`, `vocab_size`), a recipe can be planned
without its data at hand; when they are read, what is found must agree.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from lowmem.schema import Section

ImageShape = Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]  # channels, height, width
DECLARED = ("image_shape", "num_classes", "vocab_size")
TestFraction = Annotated[float, Field(gt=0, lt=1)]


class AugmentConfig(Section):
    """What is done to training images, afresh at each step. Test images are left as they are."""

    flip: bool = False  # left and right swapped, for half of the images
    rand_augment_ops: Annotated[int, Field(ge=0)] = (
        0  # operations drawn for each image (RandAugment); 0 = none
    )
    rand_augment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9


class DigitsData(Section):
    """1,797 real handwritten digits of 8 x 8 pixels (scikit-learn's copy), a fixed split of 1,437 to 360."""

    name: Literal["digits"]
    augment: AugmentConfig = AugmentConfig()


class DeclaredImages(Section):
    """What all images from files have in common."""

    image_shape: ImageShape | None = None
    num_classes: PositiveInt | None = None

    @property
    def known_shape(self) -> list[int] | None:
        """Without looking at the data."""
        return self.image_shape


class PixelImages(DeclaredImages):
    """Images of bytes, in 1 or 3 channels."""

    augment: AugmentConfig = AugmentConfig()


class IdxImagesData(PixelImages):
    """A folder of MNIST-format files (idx3 images, idx1 labels, train and t10k, gzipped or not)."""

    name: Literal["idx_images"]
    path: str


class NpzImagesData(PixelImages):
    """A NumPy archive:

    `{train,test}_labels`, and `{train,test}_images`, or `_jpeg` with `_offsets` (see data_npz.py).
    """

    name: Literal["npz_images"]
    path: str


class SquareImages(PixelImages):
    """Images of any size, made RGB, resized until the short side is `image_size`, and cut to a square in the
    middle.
    """

    image_size: PositiveInt  # pixels

    @property
    def known_shape(self) -> list[int]:
        return [3, self.image_size, self.image_size]

    @model_validator(mode="after")
    def _square(self) -> SquareImages:
        if self.image_shape not in (None, self.known_shape):
            raise ValueError(
                f"image_shape: found {self.image_shape}; allowed with image_size {self.image_size}: {self.known_shape}; leave it out"
            )
        return self


class ImageFolderData(SquareImages):
    """DIR/train/CLASS/* and DIR/test/CLASS/* (or DIR/val), or DIR/CLASS/*, of which `test_fraction` becomes
    the test part.
    """

    name: Literal["image_folder"]
    path: str
    test_fraction: TestFraction = 0.1


class HuggingfaceSource(Section):
    """A data set that the library `datasets` knows by name: on its hub, or in a folder."""

    name: Literal["huggingface"]
    dataset: str
    subset: str | None = None
    revision: str | None = None  # of the hub's repository: a commit; None = the newest
    train_split: str = "train"  # a share of one too, as in train[:90%]
    test_split: str = "test"


class HuggingfaceImages(HuggingfaceSource, SquareImages):
    kind: Literal["images"]
    image_column: str = "image"
    label_column: str = "label"


class LatentArraysData(DeclaredImages):
    """A folder with an autoencoder's latents:

    `{train,test}_latents.npy` [N, C, H, W] and `{train,test}_labels.npy` [N].
    """

    name: Literal["latent_arrays"]
    path: str
    scale: Annotated[float, Field(gt=0)] = (
        0.18215  # what latents are multiplied by, for a variance of about 1; this is Stable Diffusion's
    )


class StdlibTextData(Section):
    """The source text of Python's own standard library, as bytes: real text on every machine, nothing to
    download.
    """

    name: Literal["stdlib_text"]


class TokenisedText(Section):
    """What all text that a tokenizer reads has in common."""

    # bytes | characters | a `tokenizers` JSON file | a folder with GPT-2's encoder.json and vocab.bpe
    tokenizer: str = "bytes"
    vocab_size: PositiveInt | None = None  # declared: planning opens neither text nor tokenizer


class TextData(TokenisedText):
    """A text file of the user's. The end of the file is the test part."""

    name: Literal["text"]
    path: str
    test_fraction: TestFraction = 0.1


class HuggingfaceText(HuggingfaceSource, TokenisedText):
    """The documents of a split, joined with newlines, are its text."""

    kind: Literal["text"]
    text_column: str = "text"


class CustomData(Section):
    """Batches given to `Trainer.fit` by the user."""

    name: Literal["custom"]


HuggingfaceData = Annotated[HuggingfaceImages | HuggingfaceText, Field(discriminator="kind")]
DataConfig = Annotated[
    DigitsData
    | IdxImagesData
    | NpzImagesData
    | ImageFolderData
    | LatentArraysData
    | StdlibTextData
    | TextData
    | HuggingfaceData
    | CustomData,
    Field(discriminator="name"),
]
TextConfig = StdlibTextData | TextData | HuggingfaceText
