"""Masked diffusion in continuous time (MD4, arXiv 2406.04329; DiffusionBlocks, App. D): tokens are masked,
not noised.

    t         level: 0 is clean, 1 is all masked      alpha(t)  share of tokens not masked, from 1 down to 0
    w(t)      -alpha'(t) / (1 - alpha(t))             NELBO     sum over masked tokens of w(t) CE, integrated over t from 0 to 1

The integral splits over the blocks' intervals of t, so their losses on intervals that do not overlap add up
to one bound on the negative log-likelihood. Losses are in nats per token. Logits exist for `head_chunk`
tokens at a time: forward and again in backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.noise import Interval, c_noise
from lowmem.objectives.base import Entered, WholeLoss, in_chunks, run_layers, weighted
from lowmem.recipe import NoiseConfig

if TYPE_CHECKING:
    from lowmem.models.base import Batch, BlockModel
    from lowmem.models.masked_lm import MaskedLm

# Levels below this are taken as this one, for w(t) grows as 1 / t. The integrand, w(t) E[CE of masked
# tokens], stays finite at 0: the bound moves by T_MIN times the integrand's change over that stretch, in
# which 1 token in 10,000 is masked, and up, since CE grows with t.
T_MIN = 1e-4


class MaskedDenoising(WholeLoss):
    """`mask_token`: what stands for a masked token in the model's input, one past the vocabulary."""

    def __init__(self, schedule: Literal["linear", "cosine"], mask_token: int, head_chunk: int) -> None:
        self.schedule, self.mask_token, self.head_chunk = schedule, mask_token, head_chunk

    # --------------------------------------------------------------------------------------------------------
    # The schedule (MD4, table 1)

    def alpha(self, t: Tensor) -> Tensor:
        """Linear 1 - t; cosine 1 - cos(pi/2 (1 - t))."""
        return 1 - self.masked_share(t)

    def masked_share(self, t: Tensor) -> Tensor:
        """1 - alpha(t), written so that nothing cancels at small t."""
        return t if self.schedule == "linear" else (math.pi / 2 * t).sin()

    def alpha_inverse(self, alpha: float) -> float:
        """t with alpha(t) = alpha, exact at both ends."""
        return 1 - alpha if self.schedule == "linear" else math.asin(1 - alpha) / (math.pi / 2)

    def weight(self, t: Tensor) -> Tensor:
        """w(t) = -alpha'(t) / (1 - alpha(t)): linear 1 / t; cosine pi/2 / tan(pi/2 t).

        Falls to 1, or 0, at t = 1.
        """
        return 1 / t if self.schedule == "linear" else math.pi / 2 / (math.pi / 2 * t).tan()

    def interval(self, block: int, num_blocks: int, noise: NoiseConfig, gamma: float) -> Interval:
        """The block's t (App. D): as much of alpha as every other block, block 0 next to t = 1.

        t_k = alpha^-1(1 - k / B); block b owns t_(B-1-b) to t_(B-b). Widened each way by gamma times its
        length in t, clamped to [0, 1].
        """
        low, high = (
            self.alpha_inverse(1 - k / num_blocks) for k in (num_blocks - 1 - block, num_blocks - block)
        )
        extra = gamma * (high - low)
        return Interval(max(low - extra, 0.0), min(high + extra, 1.0))

    # --------------------------------------------------------------------------------------------------------
    # Losses

    def block_loss(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        batch: Batch,
        interval: Interval,
        noise: NoiseConfig,
        recompute: bool,
    ) -> Tensor:
        """[B]: an unbiased estimate of the interval's part of the NELBO, in nats per token.

        Each sample has its own t. The samples' t lie evenly over the interval, one random shift for all
        (MD4's low-discrepancy draw): each is uniform in it, and their mean varies less.
        """
        h, cond, kept = self.enter_interval(model, batch, interval)
        return self.leave(model, run_layers(layers, h, cond, recompute), cond, kept, batch, noise)

    def enter(self, model: BlockModel, batch: Batch, noise: NoiseConfig) -> Entered:
        """The same model as one denoiser of the whole range."""
        return self.enter_interval(model, batch, Interval(0.0, 1.0))

    def enter_interval(self, model: BlockModel, batch: Batch, interval: Interval) -> Entered:
        tokens = batch["tokens"]
        size, length = len(tokens), interval.high - interval.low
        shift = torch.rand(1, device=tokens.device)
        t = interval.low + length * ((shift + torch.arange(size, device=tokens.device) / size) % 1)
        t = t.clamp(min=T_MIN)
        mask = torch.rand(tokens.shape, device=tokens.device) < self.masked_share(t)[:, None]
        return Entered(*self.input(model, tokens, mask, t), {"mask": mask, "t": t, "length": length})

    def leave(
        self,
        model: BlockModel,
        h: Tensor,
        cond: Tensor,
        kept: dict[str, Any],
        batch: Batch,
        noise: NoiseConfig,
    ) -> Tensor:
        loss = self.head_losses(model, model.output_part(h, cond), batch["tokens"])
        return torch.as_tensor(kept["length"] * self.weighted_mean(loss, kept["mask"], kept["t"]))

    def density(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        tokens: Tensor,
        mask: Tensor,
        t: Tensor,
        recompute: bool = False,
    ) -> Tensor:
        """w(t) / L times the cross-entropy summed over masked tokens, [B]: the integrand of the NELBO.

        For tokens [B, L], mask [B, L] (true: masked) and t [B].
        """
        return self.weighted_mean(self.losses(model, layers, tokens, mask, t, tokens, recompute), mask, t)

    def weighted_mean(self, loss: Tensor, mask: Tensor, t: Tensor) -> Tensor:
        """[B], of a loss per token [B, L]."""
        return weighted(
            (loss * mask).mean(1), self.weight(t)
        )  # a product, not a selection: the planner needs shapes that no data decide

    def losses(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        context: Tensor,
        mask: Tensor,
        t: Tensor,
        tokens: Tensor,
        recompute: bool = False,
    ) -> Tensor:
        """Cross-entropy of each of `tokens` [B, L], masked or not, from the unmasked ones of `context` [B,
        L]; logits in chunks.
        """
        return self.head_losses(model, self.features(model, layers, context, mask, t, recompute), tokens)

    def head_losses(self, model: BlockModel, features: Tensor, tokens: Tensor) -> Tensor:
        """[B, L], from features [B, L, D]."""

        def loss(part: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(model, part), target, reduction="none")

        return in_chunks(loss, self.head_chunk, features.flatten(0, -2), tokens.flatten()).view(tokens.shape)

    def input(self, model: BlockModel, tokens: Tensor, mask: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The input part. The model sees t as EDM's c_noise = ln(t) / 4: small t differ by their ratio."""
        return model.input_part({"tokens": tokens}, tokens.masked_fill(mask, self.mask_token), c_noise(t))

    def features(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        tokens: Tensor,
        mask: Tensor,
        t: Tensor,
        recompute: bool = False,
    ) -> Tensor:
        """[B, L, D] before the head, at all positions."""
        h, cond = self.input(model, tokens, mask, t)
        return model.output_part(run_layers(layers, h, cond, recompute), cond)

    def logits(self, model: BlockModel, features: Tensor) -> Tensor:
        """[N, V] in fp32, for features [N, D]."""
        lm: MaskedLm = model  # type: ignore[assignment]
        return torch.as_tensor(lm.head(features).float())

    def health(self, model: BlockModel) -> dict[str, float]:
        return {}
