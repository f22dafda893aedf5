"""`data.scale: measured`: image targets with the standard deviation that the preconditioning assumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import recipe_with

from lowmem.data.config import DigitsData
from lowmem.data.datasets import load_data
from lowmem.data.image_source import measured_scale
from lowmem.data.images import ImageSet, bytes_to_float
from lowmem.errors import ConfigError, DataError
from lowmem.job import plan_recipe
from lowmem.models import model_builder
from lowmem.planning.run_data import spec_of, with_identity

DIT: dict[str, Any] = {
    "model": {"name": "dit", "num_layers": 2, "dim": 32, "num_heads": 2, "patch_size": 4},
    "blocks__num_blocks": 2,
}


def images(values: Any) -> ImageSet:
    rows = {"image": np.asarray(values, np.uint8), "label": np.zeros(len(values), np.int64)}
    return ImageSet((1, 1, 1), 1, lambda: (rows, rows), lambda _: None)


def test_the_scale_is_one_over_the_deviation_of_the_training_images() -> None:
    values = np.random.default_rng(0).integers(0, 256, (700, 1, 1, 1))
    found = measured_scale(images(values), bytes_to_float)
    pixels = bytes_to_float({"image": values.astype(np.uint8)})["image"].astype(np.float64)
    assert found == pytest.approx(1 / pixels.std(), rel=1e-5)


def test_images_of_one_grey_have_no_scale() -> None:
    with pytest.raises(DataError, match="data.scale: found training images with a variance of") as caught:
        measured_scale(images(np.full((9, 1, 1, 1), 7)), bytes_to_float)
    assert "\n" not in str(caught.value)


def test_it_is_stored_in_the_run_and_gives_the_target_the_assumed_deviation(tmp_path: Path) -> None:
    recipe = recipe_with(**DIT, data={"name": "digits", "scale": "measured"})
    plan = plan_recipe(recipe, "cpu-4gib")
    assert plan.data is None
    plan, _ = with_identity(plan, tmp_path, False)
    assert plan.data is not None and plan.data.image_scale is not None
    objective: Any = model_builder(recipe, spec_of(plan))().make_objective(recipe.noise)
    digits = load_data(DigitsData(name="digits"))
    image = torch.from_numpy(digits.batch(0, 0, digits.num_train)["image"])
    y = objective.target(image)
    assert float(y.std(correction=0)) == pytest.approx(recipe.noise.sigma_data, rel=1e-4)
    assert torch.allclose(objective.image(y), image, atol=1e-6)


def test_without_it_the_target_is_what_it_was(tmp_path: Path) -> None:
    recipe = recipe_with(**DIT, data={"name": "digits"})
    plan, _ = with_identity(plan_recipe(recipe, "cpu-4gib"), tmp_path, False)
    assert plan.data is not None and plan.data.image_scale is None
    objective: Any = model_builder(recipe, spec_of(plan))().make_objective(recipe.noise)
    image = torch.rand(4, 1, 8, 8)
    assert torch.equal(objective.target(image), image * recipe.noise.sigma_data)


def test_images_that_are_no_targets_are_not_scaled() -> None:
    with pytest.raises(ConfigError, match="data.scale: found 'measured'; allowed with model.name vit"):
        recipe_with(data={"name": "digits", "scale": "measured"})
