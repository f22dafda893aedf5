"""The models by name, each built from a recipe and what the data are.

Build them under `torch.device("meta")`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem.recipe import Recipe

if TYPE_CHECKING:
    from lowmem.data.datasets import DataSpec
    from lowmem.models.base import BuildModel


def model_builder(recipe: Recipe, spec: DataSpec) -> BuildModel:
    """The `build_model` of a recipe. Raises ConfigError where model and data do not go together."""
    return recipe.model.builder(recipe, spec)
