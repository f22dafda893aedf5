"""Classification as denoising of the label's embedding (paper, section 5.1 and App. C).

Cross-entropy is unweighted by default: the paper's w(sigma) spans 45,560x where cross-entropy spans 1.6x, and
the released code's product of [B] by [B, 1] throws the weight away unseen. `noise.weighting: edm` applies it
per sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.noise import Interval, append_dims, block_interval, c_in, c_noise, drawn_levels, loss_weight
from lowmem.objectives.base import Entered, WholeLoss, mean_cosine, run_layers, weighted
from lowmem.recipe import NoiseConfig, NoisyInput, Readout

if TYPE_CHECKING:
    from lowmem.models.base import Batch, BlockModel


class LabelDenoising(WholeLoss):
    """Classification as denoising: y = the label's row of a table at length 1, z = y + sigma eps;
    cross-entropy on logits.

    `noisy_input`: what the network sees of z: `scaled` is c_in z (paper), `posterior` the context-free mean
    E[y | z], `none` neither z nor sigma. `readout`: `plain` takes the network's logits, `bayes` adds the
    analytic term E z / sigma^2. `image_drop`: the share of training samples that see a blank image, so that
    the chain can be guided. The model must have `target_table() -> [K, D]`, rows of length 1: the same table
    in training and in the sampler.
    """

    def __init__(
        self, noisy_input: NoisyInput = "scaled", readout: Readout = "plain", image_drop: float = 0.0
    ) -> None:
        self.noisy_input, self.readout, self.image_drop = noisy_input, readout, image_drop

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
        label = batch["label"]
        sigma = drawn_levels(label.shape, label.device, interval, noise)
        z = self.noised(F.embedding(label, model.target_table()), sigma)  # type: ignore[operator]
        seen = {**batch, "image": self.drop_images(batch["image"])} if self.image_drop else batch
        loss = F.cross_entropy(
            self.logits(model, layers, seen, z, sigma, noise, recompute), label, reduction="none"
        )
        return weighted(loss, loss_weight(sigma, noise.sigma_data)) if noise.weighting == "edm" else loss

    def enter(self, model: BlockModel, batch: Batch, noise: NoiseConfig) -> Entered:
        return Entered(*model.input_part(batch, None, None), {})

    def leave(
        self,
        model: BlockModel,
        h: Tensor,
        cond: Tensor,
        kept: dict[str, Any],
        batch: Batch,
        noise: NoiseConfig,
    ) -> Tensor:
        return F.cross_entropy(model.output_part(h, cond).float(), batch["label"], reduction="none")

    @staticmethod
    def noised(y: Tensor, sigma: Tensor) -> Tensor:
        return y + append_dims(sigma, y.ndim) * torch.randn_like(y)

    def logits(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        batch: Batch,
        z: Tensor,
        sigma: Tensor,
        noise: NoiseConfig,
        recompute: bool = False,
    ) -> Tensor:
        """[B, K] in fp32, for z [B, D] at levels sigma [B]."""
        level = append_dims(sigma, z.ndim)
        noisy: Tensor | None = None if self.noisy_input == "none" else c_in(level, noise.sigma_data) * z
        evidence = None
        if self.noisy_input == "posterior" or self.readout == "bayes":
            table: Tensor = model.target_table()  # type: ignore[operator]
            evidence = z @ table.T / level**2
            if self.noisy_input == "posterior":
                noisy = evidence.softmax(-1) @ table
        h, cond = model.input_part(batch, noisy, None if noisy is None else c_noise(sigma))
        out = model.output_part(run_layers(layers, h, cond, recompute), cond).float()
        return out + evidence if self.readout == "bayes" and evidence is not None else out

    def guided_logits(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        batch: Batch,
        z: Tensor,
        sigma: Tensor,
        noise: NoiseConfig,
        guidance: float,
    ) -> Tensor:
        """Blank + guidance (image - blank), [B, K]; with guidance 1 the logits themselves."""
        logits = self.logits(model, layers, batch, z, sigma, noise)
        if guidance == 1:
            return logits
        blank = self.logits(
            model, layers, {**batch, "image": torch.zeros_like(batch["image"])}, z, sigma, noise
        )
        return blank + guidance * (logits - blank)

    def drop_images(self, image: Tensor) -> Tensor:
        keep = torch.rand(len(image), device=image.device) >= self.image_drop
        return image * append_dims(keep, image.ndim)

    def denoised(self, model: BlockModel, logits: Tensor) -> Tensor:
        """D = E[y] under softmax(logits), with the normalised table that training used."""
        table: Tensor = model.target_table()  # type: ignore[operator]
        return logits.softmax(-1) @ table

    @torch.no_grad()
    def health(self, model: BlockModel) -> dict[str, float]:
        return {"table_cosine": mean_cosine(model.target_table())}  # type: ignore[operator]
