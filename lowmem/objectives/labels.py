"""Classification as denoising of the label's embedding (paper, section 5.1 and App. C).

Cross-entropy is unweighted by default: the paper's w(sigma) spans 45,560x where cross-entropy spans 1.6x, and
the released code multiplies [B] by [B, 1], which throws the weight away unseen. `noise.weighting: edm`
applies it per sample.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.noise import Interval, append_dims, c_in, c_noise, drawn_levels
from lowmem.objectives.base import (
    Batch,
    Entered,
    Kept,
    Objective,
    TargetTable,
    at_levels,
    mean_cosine,
    run_layers,
)
from lowmem.recipe import NoiseConfig, NoisyInput, Readout


class LabelDenoising(Objective[TargetTable, Kept]):
    """Classification as denoising: y = the label's row of a table at length 1, z = y + sigma eps.

    The loss is the cross-entropy of the logits. `noisy_input` says what the network sees of z: `scaled` is
    c_in z (paper), `posterior` the context-free mean E[y | z], `none` neither z nor sigma. `readout`: `plain`
    takes the network's logits, `bayes` adds the analytic term E z / sigma^2. `image_drop` is the share of
    training samples that see a blank image, so that the chain can be guided.
    """

    def __init__(
        self,
        model: TargetTable,
        noise: NoiseConfig,
        noisy_input: NoisyInput = "scaled",
        readout: Readout = "plain",
        image_drop: float = 0.0,
    ) -> None:
        super().__init__(model, noise)
        self.noisy_input, self.readout, self.image_drop = noisy_input, readout, image_drop

    def target_shape(self) -> tuple[int, int]:
        num_rows, dim = self.model.target_table().shape
        return num_rows, dim

    def block_loss(
        self, layers: Iterable[nn.Module], batch: Batch, interval: Interval, recompute: bool = False
    ) -> Tensor:
        label = batch["label"]
        sigma = drawn_levels(label.shape, label.device, interval, self.noise)
        z = self.noised(F.embedding(label, self.model.target_table()), sigma)
        seen = {**batch, "image": self.drop_images(batch["image"])} if self.image_drop else batch
        loss = F.cross_entropy(self.logits(layers, seen, z, sigma, recompute), label, reduction="none")
        return at_levels(loss, sigma, self.noise)

    def enter(self, batch: Batch) -> Entered:
        return Entered(*self.model.input_part(batch, None, None), Kept())

    def leave(self, h: Tensor, cond: Tensor, kept: Kept, batch: Batch) -> Tensor:
        return F.cross_entropy(self.model.output_part(h, cond).float(), batch["label"], reduction="none")

    @staticmethod
    def noised(y: Tensor, sigma: Tensor) -> Tensor:
        return y + append_dims(sigma, y.ndim) * torch.randn_like(y)

    def logits(
        self, layers: Iterable[nn.Module], batch: Batch, z: Tensor, sigma: Tensor, recompute: bool = False
    ) -> Tensor:
        """[B, K] in fp32, for z [B, D] at levels sigma [B]."""
        level = append_dims(sigma, z.ndim)
        noisy: Tensor | None = None if self.noisy_input == "none" else c_in(level, self.noise.sigma_data) * z
        evidence = None
        if self.noisy_input == "posterior" or self.readout == "bayes":
            table = self.model.target_table()
            evidence = z @ table.T / level**2
            if self.noisy_input == "posterior":
                noisy = evidence.softmax(-1) @ table
        h, cond = self.model.input_part(batch, noisy, None if noisy is None else c_noise(sigma))
        out = self.model.output_part(run_layers(layers, h, cond, recompute), cond).float()
        return out + evidence if self.readout == "bayes" and evidence is not None else out

    def guided_logits(
        self, layers: Iterable[nn.Module], batch: Batch, z: Tensor, sigma: Tensor, guidance: float
    ) -> Tensor:
        """Blank + guidance (image - blank), [B, K]. With guidance 1 these are the logits themselves."""
        logits = self.logits(layers, batch, z, sigma)
        if guidance == 1:
            return logits
        blank = self.logits(layers, {**batch, "image": torch.zeros_like(batch["image"])}, z, sigma)
        return blank + guidance * (logits - blank)

    def drop_images(self, image: Tensor) -> Tensor:
        keep = torch.rand(len(image), device=image.device) >= self.image_drop
        return image * append_dims(keep, image.ndim)

    def denoised(self, logits: Tensor) -> Tensor:
        """D = E[y] under softmax(logits), with the normalised table that training used."""
        return logits.softmax(-1) @ self.model.target_table()

    @torch.no_grad()
    def health(self) -> dict[str, float]:
        return {"table_cosine": mean_cosine(self.model.target_table())}
