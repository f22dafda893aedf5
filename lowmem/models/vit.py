"""A vision transformer that classifies: [CLS] + patches + one noisy label token, read out at [CLS] (paper,
5.1).

Trained end to end the same model sees [CLS] + patches alone: there is no label to denoise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowmem.data.datasets import DataSpec
from lowmem.errors import ConfigError
from lowmem.models.base import BlockModel, BuildModel, images_of
from lowmem.models.layers import Layer, Linear, Table, TimeEmbedding, modulate, patchify
from lowmem.models.sections import VitModel
from lowmem.objectives.base import Batch
from lowmem.objectives.labels import LabelDenoising
from lowmem.recipe import NoiseConfig, Recipe


def builder(config: VitModel, recipe: Recipe, spec: DataSpec) -> BuildModel:
    image_shape, num_classes = images_of(recipe, spec, config.patch_size)
    if num_classes < 2:
        raise ConfigError(
            f"data: found {num_classes} class; allowed for a classifier: 2 or more; give more classes"
        )
    return lambda: Vit(config, image_shape, num_classes)


class Vit(BlockModel):
    """`image_shape` = (channels, height, width) in pixels; both sides must be multiples of the patch size."""

    def __init__(self, config: VitModel, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.config, self.image_shape, self.num_classes = config, image_shape, num_classes
        num_patches = (height // config.patch_size) * (width // config.patch_size)
        self.patches = Linear(channels * config.patch_size**2, config.dim)
        self.positions = Table(1 + num_patches, config.dim, std=0.5)
        self.cls = Table(1, config.dim)
        self.labels = Table(num_classes, config.dim, std=1.0)
        self.label_in = Linear(config.dim, config.dim)
        self.time = TimeEmbedding(config.dim)
        self.layers = nn.ModuleList(
            Layer(config.dim, config.num_heads, config.mlp_ratio, config.dropout)
            for _ in range(config.num_layers)
        )
        self.final_modulation = Linear(config.dim, 2 * config.dim, zero=True)
        self.head = Linear(config.dim, num_classes, zero=True)

    def make_objective(self, noise: NoiseConfig) -> LabelDenoising:
        config = self.config
        return LabelDenoising(self, noise, config.noisy_input, config.readout, config.image_drop)

    def example_batch(self, batch_size: int) -> Batch:
        label = torch.zeros(batch_size, dtype=torch.long)
        return {"image": torch.zeros(batch_size, *self.image_shape), "label": label}

    def target_table(self) -> Tensor:
        return self.labels.normalized()

    def input_part(self, batch: Batch, noisy: Tensor | None, c_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        image = batch["image"].to(self.patches.weight.dtype)
        tokens = [
            self.cls.weight.expand(len(image), 1, -1),
            self.patches(patchify(image, self.config.patch_size)),
        ]
        h = torch.cat(tokens, dim=1) + self.positions.weight
        if noisy is not None:
            h = torch.cat([h, self.label_in(noisy.to(h.dtype))[:, None]], dim=1)
        return h, self.time(
            c_noise if c_noise is not None else image.new_zeros(len(image), dtype=torch.float32)
        )

    def output_part(self, h: Tensor, cond: Tensor) -> Tensor:
        """Logits [B, K], read out at [CLS]."""
        shift, scale = self.final_modulation(torch.nn.functional.silu(cond)).chunk(2, dim=-1)
        return torch.as_tensor(self.head(modulate(h[:, :1], shift, scale)))[:, 0]
