"""Augmentation: a function of (seed, step, position) that changes training images only."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import batches_digest, recipe_with
from PIL import Image

from lowmem.data.augment import Augment, operations
from lowmem.data.config import AugmentConfig
from lowmem.data.datasets import Dataset, load_data
from lowmem.errors import ConfigError, DataError
from lowmem.recipe import Recipe

ALL = {"flip": True, "rand_augment_ops": 2, "rand_augment_magnitude": 9}


def augment(**keys: Any) -> Augment:
    return Augment(AugmentConfig(**keys))


def slopes(count: int, channels: int) -> np.ndarray[Any, Any]:
    """uint8 [N, C, 24, 20]: rises from 0 to 255, elsewhere in every image and channel, with a white spot."""
    y, x = np.mgrid[0:24, 0:20] / 23
    share = np.random.default_rng(0).random((count, channels, 1, 1))
    images = share * y + (1 - share) * x
    images[..., 4:9, 3:6] = images.max()
    return np.asarray(np.rint(images / images.max((-2, -1), keepdims=True) * 255), np.uint8)


def digits(**keys: Any) -> Dataset:
    return load_data(recipe_with(data={"name": "digits", "augment": keys}).data)


def recipes(folder: Path) -> dict[str, Recipe]:
    """The same 12 images under every name that can be augmented, but for idx files."""
    images, labels = slopes(12, 3), np.arange(12) % 2
    np.savez(
        folder / "images.npz",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
    )
    for part in ("train", "test"):
        for n, image in enumerate(images):
            (folder / part / str(n % 2)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / part / str(n % 2) / f"{n}.png")
    sections = {
        "digits": {"name": "digits"},
        "npz_images": {"name": "npz_images", "path": str(folder / "images.npz")},
        "image_folder": {"name": "image_folder", "path": str(folder), "image_size": 16},
    }
    return {name: recipe_with(data=section) for name, section in sections.items()}


def augmented(recipe: Recipe, **keys: Any) -> Recipe:
    return recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"augment": AugmentConfig(**keys)})}
    )


@pytest.mark.parametrize("name", ["digits", "npz_images", "image_folder"])
def test_augmented_batches_are_a_function_of_seed_and_step_and_test_batches_are_left_alone(
    name: str, tmp_path: Path
) -> None:
    plain = recipes(tmp_path)[name]
    data, other, without = (
        load_data(augmented(plain, **ALL).data),
        load_data(augmented(plain, **ALL).data),
        load_data(plain.data),
    )
    for step in (0, 7):
        other.batch(3, step + 1, 5)  # what was drawn before does not matter
        batch = data.batch(3, step, 8)
        assert batches_digest([batch]) == batches_digest([other.batch(3, step, 8)])
        assert batches_digest([batch]) != batches_digest([without.batch(3, step, 8)])
        assert (
            batch["image"].shape == without.batch(3, step, 8)["image"].shape
            and batch["image"].dtype == np.float32
        )
        assert batch["image"].min() >= -1 and batch["image"].max() <= 1 and batch["image"].flags.c_contiguous
        assert (batch["label"] == without.batch(3, step, 8)["label"]).all()
    assert batches_digest(data.test_batches(5)) == batches_digest(without.test_batches(5))
    assert batches_digest(
        [load_data(augmented(plain, **ALL).data, augmented=False).batch(3, 0, 8)]
    ) == batches_digest([without.batch(3, 0, 8)])


def test_without_augmentation_the_bits_are_those_of_a_recipe_that_does_not_name_it() -> None:
    off = digits(flip=False, rand_augment_ops=0, rand_augment_magnitude=30)
    assert batches_digest([off.batch(0, 5, 64)]) == batches_digest(
        [load_data(recipe_with().data).batch(0, 5, 64)]
    )


def test_each_seed_step_and_position_has_draws_of_its_own() -> None:
    images = np.repeat(slopes(1, 3), 40, axis=0)
    change = augment(**ALL)
    assert len({image.tobytes() for image in change(images, 0, 0)}) > 20
    assert len({change(images, seed, step).tobytes() for seed in (0, 1) for step in (0, 1)}) == 4
    assert (change(images[:7], 0, 3) == change(images, 0, 3)[:7]).all()


def test_a_flip_swaps_left_and_right_of_about_half_the_images() -> None:
    images = slopes(1000, 1)
    flipped = augment(flip=True)(images, 0, 0)
    same, mirrored = ((flipped == other).all((1, 2, 3)) for other in (images, images[..., ::-1]))
    assert (same ^ mirrored).all() and 450 < mirrored.sum() < 550
    again = (augment(flip=True)(images, 0, 1) == images[..., ::-1]).all((1, 2, 3))
    assert 400 < (again == mirrored).sum() < 600, "another step flips others"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", operations())
def test_an_operation_keeps_shape_and_kind_does_nothing_at_magnitude_0_and_something_at_30(
    name: str, channels: int
) -> None:
    image = slopes(1, channels)[0]
    picture = Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0))
    operation = operations()[name]
    for sign in (1, -1):
        none, full = operation(picture, 0.0, sign), operation(picture, 1.0, sign)
        assert none.size == full.size == picture.size and none.mode == full.mode == picture.mode
        if name not in ("autocontrast", "equalize"):  # which have no magnitude
            assert none.tobytes() == picture.tobytes()
        # The image's values reach from 0 to 255 already, and grey has no colour.
        if name not in ("identity", "autocontrast") and (name, channels) != ("color", 1):
            assert full.tobytes() != picture.tobytes()


def test_the_operations_are_the_usual_fourteen_and_all_are_drawn() -> None:
    assert len(operations()) == 14
    images = np.repeat(slopes(1, 3), 300, axis=0)
    for magnitude, least in ((30, 20), (0, 2)):
        made = augment(rand_augment_ops=1, rand_augment_magnitude=magnitude)(images, 0, 0)
        assert len({image.tobytes() for image in made}) >= least
    assert np.abs(made.astype(int) - images).mean() < 12, "at magnitude 0 only contrast is evened out"
    assert (made == images).all((1, 2, 3)).mean() > 0.7


def test_full_ranges_are_those_of_the_literature() -> None:
    steps = {name: operation for name, operation in operations().items()}
    column = Image.fromarray(np.pad(np.full((331, 1), 255, np.uint8), ((0, 0), (165, 165))))
    shifted = np.asarray(steps["translate_x"](column, 1.0, 1))
    assert shifted[100].argmax() == 165 - 150
    sheared = np.asarray(steps["shear_x"](column, 1.0, 1))
    assert sheared[0].argmax() - sheared[330].argmax() == round(0.3 * 330)
    grey = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(2, 0))
    assert len(np.unique(np.asarray(steps["posterize"](grey, 1.0, 1)))) == 16
    assert (np.asarray(steps["solarize"](grey, 1.0, 1)) == 255 - np.asarray(grey)).all()
    assert np.asarray(steps["brightness"](grey, 1.0, -1)).max() == int(0.1 * 255)
    rotated = np.asarray(steps["rotate"](column, 1.0, 1))
    assert rotated[165 - 80, 165 - 46] > 100  # 30 degrees counter-clockwise


def test_augmentation_that_cannot_be_done_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match="data.augment.rand_augment_magnitude: found 31; allowed: less than or equal to 30"
    ):
        digits(rand_augment_magnitude=31)
    with pytest.raises(ConfigError, match="unknown key 'data.augment.flips'; did you mean 'flip'"):
        digits(flips=True)
    with pytest.raises(ConfigError, match="unknown key 'data.augment'"):
        recipe_with(data={"name": "stdlib_text", "augment": {"flip": True}})
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        DataError, match=r"data.augment.rand_augment_ops needs the package Pillow.*'lowmem\[data\]'"
    ):
        digits(rand_augment_ops=1)
    digits(flip=True).batch(0, 0, 4)
