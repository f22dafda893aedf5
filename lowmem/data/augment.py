"""Random changes to training images: flips, and RandAugment (arXiv 1909.13719).

RandAugment uses its usual operations and ranges. Every draw is a function of (seed, step, position in the
batch), so a resumed run sees the same pixels. Operations work on pictures of bytes in 1 or 3 channels. Pixels
that move in from beyond the border are black.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from lowmem.data.images import Array, as_array, pillow
from lowmem.schema import Section

STREAM = 1  # keeps these draws apart from draws of (seed, epoch) and (seed, step) elsewhere
FULL = 30  # the largest magnitude
Operation = Callable[[Any, float, float], Any]  # picture, magnitude from 0 to 1, sign -> picture


class AugmentConfig(Section):
    """How training images are changed, afresh at each step. Test images are left as they are."""

    flip: bool = False  # left and right swapped, for half of the images
    # RandAugment operations drawn for each image; the paper has 1 to 3, and each takes a pass over it
    rand_augment_ops: Annotated[int, Field(ge=0, le=100)] = 0
    rand_augment_magnitude: Annotated[int, Field(ge=0, le=FULL)] = 9

    def made(self) -> Augment | None:
        """The changes, or None if these settings change nothing. Raises DataError as Augment does."""
        return Augment(self) if self.flip or self.rand_augment_ops else None


class Augment:
    """Changes a batch of training images. Raises DataError if operations are wanted without Pillow."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        self._operations = list(operations().values()) if config.rand_augment_ops else []

    def __call__(self, images: Array, seed: int, step: int) -> Array:
        """uint8 [B, C, H, W] -> the same shape and type."""
        num_draws = 1 + 2 * self.config.rand_augment_ops
        draws = np.random.default_rng([seed, step, STREAM]).random((len(images), num_draws))
        flipped = draws[:, 0] < (0.5 if self.config.flip else 0)
        images = np.where(flipped[:, None, None, None], images[..., ::-1], images)
        if not self._operations:
            return images
        return np.stack(
            [self._rand_augment(image, row[1:]) for image, row in zip(images, draws, strict=True)]
        )

    def _rand_augment(self, image: Array, draws: Array) -> Array:
        """Each operation takes two draws: the first chooses it, the second its sign."""
        from PIL import Image

        picture = Image.fromarray(
            image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
        )
        for which, side in draws.reshape(-1, 2):
            operation = self._operations[int(which * len(self._operations))]
            picture = operation(picture, self.config.rand_augment_magnitude / FULL, 1 if side < 0.5 else -1)
        return as_array(picture)


def operations() -> dict[str, Operation]:
    """The fourteen operations by name.

    Ranges at full magnitude: shear 0.3, translation 150/331 of the side, rotation 30 degrees, enhancement
    1 +- 0.9, 4 bits fewer, and an inversion of all values from 256 (magnitude 0: no value) down to 0 on.
    Raises DataError when Pillow is not installed.
    """
    image_module = pillow("data.augment.rand_augment_ops")
    from PIL import ImageEnhance, ImageOps

    bilinear = image_module.Resampling.BILINEAR

    def affine(picture: Any, *matrix: float) -> Any:
        return picture.transform(picture.size, image_module.Transform.AFFINE, matrix, bilinear)

    def shifted(picture: Any, x: float, y: float) -> Any:
        """Moves by shares of the width and the height."""
        return affine(picture, 1, 0, x * picture.width, 0, 1, y * picture.height)

    def enhance(kind: Any) -> Operation:
        return lambda picture, m, sign: kind(picture).enhance(1 + 0.9 * m * sign)

    return {
        "identity": lambda picture, m, sign: picture,
        "autocontrast": lambda picture, m, sign: ImageOps.autocontrast(picture),
        "equalize": lambda picture, m, sign: ImageOps.equalize(picture),
        "rotate": lambda picture, m, sign: picture.rotate(30 * m * sign, bilinear),
        "solarize": lambda picture, m, sign: ImageOps.solarize(picture, round(256 * (1 - m))),
        "color": enhance(ImageEnhance.Color),
        "posterize": lambda picture, m, sign: ImageOps.posterize(picture, 8 - round(4 * m)),
        "contrast": enhance(ImageEnhance.Contrast),
        "brightness": enhance(ImageEnhance.Brightness),
        "sharpness": enhance(ImageEnhance.Sharpness),
        "shear_x": lambda picture, m, sign: affine(picture, 1, 0.3 * m * sign, 0, 0, 1, 0),
        "shear_y": lambda picture, m, sign: affine(picture, 1, 0, 0, 0.3 * m * sign, 1, 0),
        "translate_x": lambda picture, m, sign: shifted(picture, 150 / 331 * m * sign, 0),
        "translate_y": lambda picture, m, sign: shifted(picture, 0, 150 / 331 * m * sign),
    }
