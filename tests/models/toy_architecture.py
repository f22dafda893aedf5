"""A sixth architecture in a file of its own: a residual perceptron that classifies images."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from lowmem.data.datasets import DataSpec
from lowmem.models.base import BlockModel, BuildModel, images_of
from lowmem.models.layers import Linear, Table, TimeEmbedding
from lowmem.objectives.base import Batch
from lowmem.objectives.labels import LabelDenoising
from lowmem.recipe import ModelConfig, NoiseConfig, Recipe


class ToyModel(ModelConfig):
    name: Literal["toy"]
    num_layers: PositiveInt
    width: PositiveInt

    def builder(self, recipe: Recipe, spec: DataSpec) -> BuildModel:
        (channels, height, width), num_classes = images_of(recipe, spec, patch_size=1)
        return lambda: Toy(self, channels * height * width, num_classes)

    def contradiction(self, recipe: Recipe) -> str | None:
        return "model.width: found 1; allowed: at least 2; raise it" if self.width == 1 else None


class ToyLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = Linear(width, width), Linear(width, width, zero=True)

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        return torch.as_tensor(h + self.outer(torch.relu(self.inner(h + cond))))


class Toy(BlockModel):
    def __init__(self, config: ToyModel, num_pixels: int, num_classes: int) -> None:
        super().__init__()
        self.num_pixels = num_pixels
        self.pixels, self.label_in = Linear(num_pixels, config.width), Linear(config.width, config.width)
        self.labels, self.time = Table(num_classes, config.width, std=1.0), TimeEmbedding(config.width)
        self.layers = nn.ModuleList(ToyLayer(config.width) for _ in range(config.num_layers))
        self.head = Linear(config.width, num_classes, zero=True)

    def make_objective(self, noise: NoiseConfig) -> LabelDenoising:
        return LabelDenoising(self, noise)

    def example_batch(self, batch_size: int) -> Batch:
        side = int(self.num_pixels**0.5)
        image = torch.zeros(batch_size, 1, side, side)
        return {"image": image, "label": torch.zeros(batch_size, dtype=torch.long)}

    def target_table(self) -> Tensor:
        return self.labels.normalized()

    def input_part(self, batch: Batch, noisy: Tensor | None, c_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.pixels(batch["image"].flatten(1))
        if noisy is not None:
            h = h + self.label_in(noisy)
        return h[:, None], self.time(torch.zeros(len(h)) if c_noise is None else c_noise)

    def output_part(self, h: Tensor, cond: Tensor) -> Tensor:
        return torch.as_tensor(self.head(h[:, 0]))
