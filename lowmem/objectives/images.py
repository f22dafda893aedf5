"""Images as targets: EDM denoising under a weighted L2 loss (paper, section 5.2; preconditioning from EDM,
table 1).

Unlike a label, an image is its own context: the network sees z and the class, and denoising does real work at
every level.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowmem.noise import Interval, append_dims, block_interval, c_in, c_noise, c_out, c_skip, sample_sigma
from lowmem.objectives.base import Entered, WholeLoss, l2_loss, run_layers
from lowmem.recipe import NoiseConfig

if TYPE_CHECKING:
    from lowmem.models.base import Batch, BlockModel


class ImageDenoising(WholeLoss):
    """y = sigma_data times the image in [-1, 1], z = y + sigma eps; the loss is w(sigma) ||D - y||^2, or
    unweighted with `noise.weighting: none`.

    No statistics of the data are needed: pixels in [-1, 1] have a standard deviation of at most 1, so y's is
    at most sigma_data. `label_drop`: the share of training samples that see no class (label = the model's
    `num_classes`), so that sampling can be guided.
    """

    def __init__(self, label_drop: float = 0.1) -> None:
        self.label_drop = label_drop

    def interval(self, block: int, num_blocks: int, noise: NoiseConfig, gamma: float) -> Interval:
        return block_interval(block, num_blocks, noise, gamma)

    def block_loss(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        batch: Batch,
        interval: Interval,
        noise: NoiseConfig,
        recompute: bool,
    ) -> Tensor:
        h, cond, kept = self._entered(model, batch, interval, noise)
        return self.leave(model, run_layers(layers, h, cond, recompute), cond, kept, batch, noise)

    def enter(self, model: BlockModel, batch: Batch, noise: NoiseConfig) -> Entered:
        """The same loss over all levels: an ordinary DiT."""
        return self._entered(model, batch, Interval(noise.sigma_min, noise.sigma_max), noise)

    def _entered(self, model: BlockModel, batch: Batch, interval: Interval, noise: NoiseConfig) -> Entered:
        y = self.target(batch["image"], noise)
        sigma = sample_sigma(torch.rand(len(y), device=y.device), interval, noise)
        z = self.noised(y, sigma)
        seen = {**batch, "label": self.drop_labels(batch["label"], model.num_classes)}  # type: ignore[arg-type]
        return Entered(*self._input(model, seen, z, sigma, noise), {"z": z, "sigma": sigma})

    def leave(
        self,
        model: BlockModel,
        h: Tensor,
        cond: Tensor,
        kept: dict[str, Any],
        batch: Batch,
        noise: NoiseConfig,
    ) -> Tensor:
        denoised = self._output(model, h, cond, kept["z"], kept["sigma"], noise)
        return self.loss(denoised, self.target(batch["image"], noise), kept["sigma"], noise)

    def denoised(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        batch: Batch,
        z: Tensor,
        sigma: Tensor,
        noise: NoiseConfig,
        recompute: bool = False,
    ) -> Tensor:
        """D(z; sigma) = c_skip z + c_out F(c_in z; c_noise, label), fp32, for z [B, C, H, W] at levels sigma
        [B].
        """
        h, cond = self._input(model, batch, z, sigma, noise)
        return self._output(model, run_layers(layers, h, cond, recompute), cond, z, sigma, noise)

    @staticmethod
    def _input(
        model: BlockModel, batch: Batch, z: Tensor, sigma: Tensor, noise: NoiseConfig
    ) -> tuple[Tensor, Tensor]:
        return model.input_part(batch, c_in(append_dims(sigma, z.ndim), noise.sigma_data) * z, c_noise(sigma))

    @staticmethod
    def _output(
        model: BlockModel, h: Tensor, cond: Tensor, z: Tensor, sigma: Tensor, noise: NoiseConfig
    ) -> Tensor:
        level = append_dims(sigma, z.ndim)
        return (
            c_skip(level, noise.sigma_data) * z
            + c_out(level, noise.sigma_data) * model.output_part(h, cond).float()
        )

    @staticmethod
    def loss(denoised: Tensor, y: Tensor, sigma: Tensor, noise: NoiseConfig) -> Tensor:
        if noise.weighting == "none":
            return (denoised - y).square().flatten(1).mean(1)
        return l2_loss(denoised, y, sigma, noise.sigma_data)

    @staticmethod
    def target(image: Tensor, noise: NoiseConfig) -> Tensor:
        """y of an image in [-1, 1]."""
        return image * noise.sigma_data

    @staticmethod
    def image(y: Tensor, noise: NoiseConfig) -> Tensor:
        """The image of a y."""
        return y / noise.sigma_data

    @staticmethod
    def noised(y: Tensor, sigma: Tensor) -> Tensor:
        return y + append_dims(sigma, y.ndim) * torch.randn_like(y)

    def drop_labels(self, label: Tensor, no_class: int) -> Tensor:
        return torch.where(torch.rand(len(label), device=label.device) < self.label_drop, no_class, label)

    def health(self, model: BlockModel) -> dict[str, float]:
        return {}
