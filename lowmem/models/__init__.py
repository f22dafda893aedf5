"""The models by name, each built from a recipe and what the data are.

Build them under `torch.device("meta")`.
"""

from __future__ import annotations

from lowmem.data.datasets import DataSpec
from lowmem.errors import ConfigError
from lowmem.models.base import BuildModel
from lowmem.recipe import CausalLmModel, DitModel, MaskedLmModel, Recipe, RecurrentLmModel, VitModel


def model_builder(recipe: Recipe, spec: DataSpec) -> BuildModel:
    """The `build_model` of a recipe. Raises ConfigError where model and data do not go together."""
    config = recipe.model
    if isinstance(config, VitModel):
        from lowmem.models.vit import Vit

        image_shape, num_classes = _images(recipe, spec, config.patch_size)
        return lambda: Vit(config, image_shape, num_classes)
    if isinstance(config, DitModel):
        from lowmem.models.dit import Dit

        image_shape, num_classes = _images(recipe, spec, config.patch_size)
        return lambda: Dit(config, image_shape, num_classes)
    if isinstance(config, MaskedLmModel):
        from lowmem.models.masked_lm import MaskedLm

        vocab_size, seq_len = _text(recipe, spec)
        return lambda: MaskedLm(config, vocab_size, seq_len)
    if isinstance(config, CausalLmModel):
        from lowmem.models.causal_lm import CausalLm

        vocab_size, seq_len = _text(recipe, spec)
        return lambda: CausalLm(config, vocab_size, seq_len, whole=recipe.method == "end_to_end")
    if isinstance(config, RecurrentLmModel):
        from lowmem.models.recurrent_lm import RecurrentLm

        vocab_size, seq_len = _text(recipe, spec)
        return lambda: RecurrentLm(config, vocab_size, seq_len)
    raise ConfigError(
        "model.name: 'custom' models are trained from Python: Trainer(build_model, plan, run_dir).fit(batches)"
    )


def _images(recipe: Recipe, spec: DataSpec, patch_size: int) -> tuple[tuple[int, int, int], int]:
    if spec.image_shape is None or spec.num_classes is None:
        raise ConfigError(
            f"model.name: '{recipe.model.name}' needs images with labels; data.name '{recipe.data.name}' has none"
        )
    _, height, width = spec.image_shape
    if height % patch_size or width % patch_size:
        raise ConfigError(
            f"model.patch_size: found {patch_size}; allowed: a divisor of the image's sides, {height} x {width} pixels"
        )
    return spec.image_shape, spec.num_classes


def _text(recipe: Recipe, spec: DataSpec) -> tuple[int, int]:
    if spec.vocab_size is None or spec.seq_len is None:
        raise ConfigError(
            f"model.name: '{recipe.model.name}' needs text; data.name '{recipe.data.name}' has none"
        )
    return spec.vocab_size, spec.seq_len
