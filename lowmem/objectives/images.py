"""Images as targets: EDM denoising under a weighted L2 loss (paper, section 5.2; EDM, table 1).

Unlike a label, an image is its own context: the network sees z and the class, and denoising does real work at
every level.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lowmem.noise import Interval, append_dims, c_in, c_noise, c_out, c_skip, sample_sigma
from lowmem.objectives.base import Batch, DenoisedModel, Entered, Kept, Objective, l2_loss, run_layers
from lowmem.recipe import NoiseConfig


class ImageModel(DenoisedModel, Protocol):
    num_classes: int  # label `num_classes` stands for no class


@dataclass(frozen=True)
class NoisyImages(Kept):
    z: Tensor  # [B, C, H, W]
    sigma: Tensor  # [B]


class ImageDenoising(Objective[ImageModel, NoisyImages]):
    """y = sigma_data times `image_scale` times the image in [-1, 1], z = y + sigma eps.

    The loss is w(sigma) ||D - y||^2, or unweighted with `noise.weighting: none`. With a scale of 1 no
    statistics of the data are needed: pixels in [-1, 1] have a standard deviation of at most 1, so y's is at
    most sigma_data. With a measured one it is sigma_data, as the preconditioning assumes.
    `label_drop` is the share of training samples that see no class, so that sampling can be guided.
    """

    def __init__(
        self, model: ImageModel, noise: NoiseConfig, label_drop: float = 0.1, image_scale: float = 1.0
    ) -> None:
        super().__init__(model, noise)
        self.label_drop, self._y_of_image = label_drop, noise.sigma_data * image_scale

    def block_loss(
        self, layers: Iterable[nn.Module], batch: Batch, interval: Interval, recompute: bool = False
    ) -> Tensor:
        h, cond, kept = self._entered(batch, interval)
        return self.leave(run_layers(layers, h, cond, recompute), cond, kept, batch)

    def enter(self, batch: Batch) -> Entered:
        """The same loss over all levels: an ordinary DiT."""
        return self._entered(batch, Interval(self.noise.sigma_min, self.noise.sigma_max))

    def _entered(self, batch: Batch, interval: Interval) -> Entered:
        y = self.target(batch["image"])
        sigma = sample_sigma(torch.rand(len(y), device=y.device), interval, self.noise)
        z = self.noised(y, sigma)
        seen = {**batch, "label": self.drop_labels(batch["label"])}
        return Entered(*self._input(seen, z, sigma), NoisyImages(z, sigma))

    def leave(self, h: Tensor, cond: Tensor, kept: NoisyImages, batch: Batch) -> Tensor:
        return self.loss(self._output(h, cond, kept.z, kept.sigma), self.target(batch["image"]), kept.sigma)

    def denoised(self, layers: Iterable[nn.Module], batch: Batch, z: Tensor, sigma: Tensor) -> Tensor:
        """D(z; sigma) = c_skip z + c_out F(c_in z; c_noise, label), fp32, for z [B, C, H, W] at levels sigma
        [B].
        """
        h, cond = self._input(batch, z, sigma)
        return self._output(run_layers(layers, h, cond), cond, z, sigma)

    def _input(self, batch: Batch, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        scale = c_in(append_dims(sigma, z.ndim), self.noise.sigma_data)
        return self.model.input_part(batch, scale * z, c_noise(sigma))

    def _output(self, h: Tensor, cond: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
        level, sigma_data = append_dims(sigma, z.ndim), self.noise.sigma_data
        return (
            c_skip(level, sigma_data) * z + c_out(level, sigma_data) * self.model.output_part(h, cond).float()
        )

    def loss(self, denoised: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """[B], of estimates and targets [B, C, H, W] at levels [B]."""
        if self.noise.weighting == "none":
            return (denoised - y).square().flatten(1).mean(1)
        return l2_loss(denoised, y, sigma, self.noise.sigma_data)

    def target(self, image: Tensor) -> Tensor:
        """y of an image in [-1, 1]."""
        return image * self._y_of_image

    def image(self, y: Tensor) -> Tensor:
        """The image of a y."""
        return y / self._y_of_image

    @staticmethod
    def noised(y: Tensor, sigma: Tensor) -> Tensor:
        return y + append_dims(sigma, y.ndim) * torch.randn_like(y)

    def drop_labels(self, label: Tensor) -> Tensor:
        dropped = torch.rand(len(label), device=label.device) < self.label_drop
        return torch.where(dropped, self.model.num_classes, label)
