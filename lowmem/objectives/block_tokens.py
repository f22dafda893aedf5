"""Next-token prediction of an ordinary decoder whose blocks are trained alone.

A block denoises the embedding y of each label: z = y + sigma eps, rows of length 1. Given the context, Bayes'
rule factorises: p(y | x, z) ~ p(y | x) exp(z . E_y / sigma^2). The analytic term is added to the logits, so a
block learns p(y | x) and sees neither z nor sigma: its layers need no change. See
`lowmem.objectives.tokens`, with `noisy_input: none` and `readout: bayes`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.noise import Interval, append_dims, drawn_levels
from lowmem.objectives.base import Batch, at_levels, mean_cosine
from lowmem.objectives.next_tokens import Decoder, NextTokens
from lowmem.objectives.tokens import HEALTH_ROWS
from lowmem.recipe import NoiseConfig


class TableDecoder(Decoder, Protocol):
    def target_table(self) -> Tensor:
        """[V, D] in fp32, rows of length 1."""
        ...


class BlockTokens(NextTokens):
    """Losses in nats per label."""

    model: TableDecoder

    def __init__(self, model: TableDecoder, noise: NoiseConfig, head_chunk: int) -> None:
        super().__init__(model, noise, head_chunk)

    def target_shape(self) -> tuple[int, int]:
        num_rows, dim = self.model.target_table().shape
        return num_rows, dim

    def block_loss(
        self, layers: Iterable[nn.Module], batch: Batch, interval: Interval, recompute: bool = False
    ) -> Tensor:
        labels = batch["labels"]
        sigma = drawn_levels(labels.shape, labels.device, interval, self.noise)
        y = self.embedded(labels)
        z = y + append_dims(sigma, 3) * torch.randn_like(y)
        losses = self.token_losses(self.features(layers, batch, recompute), labels, z, sigma)
        return at_levels(losses, sigma, self.noise).sum(1) * batch["share"]

    def embedded(self, labels: Tensor) -> Tensor:
        """y [B, T, D]. A label that takes no part has that of the first token."""
        return F.embedding(labels.clamp_min(0), self.model.target_table())

    def features(self, layers: Iterable[nn.Module], batch: Batch, recompute: bool = False) -> Tensor:
        """[B, T, D] before the head: of some layers alone, entered as the first ones are."""
        h, cond, kept = self.enter(batch)
        return self.model.output_part(self.through(layers, h, cond, kept, recompute), cond)

    def evidence(self, z: Tensor, sigma: Tensor) -> Tensor:
        return z @ self.model.target_table().T / sigma[:, None] ** 2

    def evaluation_call(self, layers: Iterable[nn.Module], batch: Batch) -> object:
        labels = batch["labels"]
        z = torch.randn_like(self.embedded(labels))
        sigma = torch.ones(labels.shape, device=labels.device)
        return self.token_losses(self.features(layers, batch), labels, z, sigma)

    @torch.no_grad()
    def health(self) -> dict[str, float]:
        return {"table_cosine": mean_cosine(self.model.target_table()[:HEALTH_ROWS])}
