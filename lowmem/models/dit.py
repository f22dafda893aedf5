"""A class-conditional diffusion transformer (DiT): patches of the noisy image in, patches of F out (paper,
section 5.2).

Trained end to end it is an ordinary DiT: the same loss, over all levels, through all layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.data.datasets import DataSpec
from lowmem.models.base import BlockModel, BuildModel, images_of
from lowmem.models.layers import Layer, Linear, Table, TimeEmbedding, modulate, patchify, unpatchify
from lowmem.models.sections import DitModel
from lowmem.objectives.base import Batch
from lowmem.objectives.images import ImageDenoising
from lowmem.recipe import NoiseConfig, Recipe


def builder(config: DitModel, recipe: Recipe, spec: DataSpec) -> BuildModel:
    image_shape, num_classes = images_of(recipe, spec, config.patch_size)
    return lambda: Dit(config, image_shape, num_classes, spec.image_scale)


class Dit(BlockModel):
    """`image_shape` = (channels, height, width) in pixels; both sides must be multiples of the patch size.

    Labels run from 0 to `num_classes`; the last one, `num_classes`, stands for no class.
    """

    def __init__(
        self,
        config: DitModel,
        image_shape: tuple[int, int, int],
        num_classes: int,
        image_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.image_scale = image_scale
        channels, height, width = image_shape
        self.config, self.image_shape, self.num_classes = config, image_shape, num_classes
        num_patches = (height // config.patch_size) * (width // config.patch_size)
        self.patches = Linear(channels * config.patch_size**2, config.dim)
        self.positions = Table(num_patches, config.dim, std=0.5)
        self.time = TimeEmbedding(config.dim)
        self.classes = Table(num_classes + 1, config.dim, std=0.5)
        self.layers = nn.ModuleList(
            Layer(config.dim, config.num_heads, config.mlp_ratio, config.dropout)
            for _ in range(config.num_layers)
        )
        self.final_modulation = Linear(config.dim, 2 * config.dim, zero=True)
        self.head = Linear(config.dim, channels * config.patch_size**2, zero=True)

    def make_objective(self, noise: NoiseConfig) -> ImageDenoising:
        return ImageDenoising(self, noise, self.config.label_drop, self.image_scale)

    def example_batch(self, batch_size: int) -> Batch:
        label = torch.zeros(batch_size, dtype=torch.long)
        return {"image": torch.zeros(batch_size, *self.image_shape), "label": label}

    def input_part(self, batch: Batch, noisy: Tensor | None, c_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """`noisy` is c_in z [B, C, H, W]; the clean image is the target and is never looked at."""
        assert noisy is not None and c_noise is not None  # trained end to end, too, it sees a noisy image
        patches = patchify(noisy.to(self.patches.weight.dtype), self.config.patch_size)
        h = self.patches(patches) + self.positions.weight
        return h, self.time(c_noise) + F.embedding(batch["label"], self.classes.weight)[:, None]

    def output_part(self, h: Tensor, cond: Tensor) -> Tensor:
        """F, the network's raw output [B, C, H, W]."""
        shift, scale = self.final_modulation(F.silu(cond)).chunk(2, dim=-1)
        return unpatchify(self.head(modulate(h, shift, scale)), self.image_shape, self.config.patch_size)
