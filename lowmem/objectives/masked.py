"""Masked diffusion in continuous time (MD4, arXiv 2406.04329; DiffusionBlocks, App. D): tokens are masked,
not noised.

    t         level: 0 is clean, 1 is all masked
    alpha(t)  share of tokens not masked, from 1 down to 0
    w(t)      -alpha'(t) / (1 - alpha(t))
    NELBO     sum over masked tokens of w(t) CE, integrated over t

The integral splits over the blocks' intervals of t, so their losses on intervals that do not overlap add up
to one bound on the negative log-likelihood. Losses are in nats per token. Logits exist for `head_chunk`
tokens at a time, in the forward pass and again in backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.noise import Interval, c_noise
from lowmem.objectives.base import (
    Batch,
    DenoisedModel,
    Entered,
    Kept,
    Objective,
    in_chunks,
    run_layers,
    weighted,
)
from lowmem.recipe import NoiseConfig

# Levels below this are taken as this one, because w(t) grows as 1 / t. The integrand, w(t) E[CE of masked
# tokens], stays finite at 0. The bound moves by T_MIN times the integrand's change over that stretch, in
# which 1 token in 10,000 is masked, and it moves up, since CE grows with t.
T_MIN = 1e-4


class MaskedModel(DenoisedModel, Protocol):
    """`output_part` gives features [B, L, D]; the head is applied to them in chunks."""

    def logits(self, features: Tensor) -> Tensor:
        """[N, V], for features [N, D]."""
        ...


@dataclass(frozen=True)
class MaskedTokens(Kept):
    mask: Tensor  # [B, L], true: masked
    t: Tensor  # [B]
    length: float  # of the interval that t was drawn from


class MaskedDenoising(Objective[MaskedModel, MaskedTokens]):
    """`mask_token` is what stands for a masked token in the model's input: one past the vocabulary."""

    def __init__(
        self,
        model: MaskedModel,
        noise: NoiseConfig,
        schedule: Literal["linear", "cosine"],
        mask_token: int,
        head_chunk: int,
    ) -> None:
        super().__init__(model, noise)
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

        At t = 1 it is 1, or 0.
        """
        return 1 / t if self.schedule == "linear" else math.pi / 2 / (math.pi / 2 * t).tan()

    def interval(self, block: int, num_blocks: int, gamma: float = 0.0) -> Interval:
        """The block's t (App. D): as much of alpha as every other block owns; block 0 lies next to t = 1.

        t_k = alpha^-1(1 - k / B); block b owns t_(B-1-b) to t_(B-b). The interval is widened each way by
        gamma times its length in t and clamped to [0, 1].
        """
        low, high = (
            self.alpha_inverse(1 - k / num_blocks) for k in (num_blocks - 1 - block, num_blocks - block)
        )
        extra = gamma * (high - low)
        return Interval(max(low - extra, 0.0), min(high + extra, 1.0))

    # --------------------------------------------------------------------------------------------------------
    # Losses

    def block_loss(
        self, layers: Iterable[nn.Module], batch: Batch, interval: Interval, recompute: bool = False
    ) -> Tensor:
        """[B]: an unbiased estimate of the interval's part of the NELBO, in nats per token.

        Each sample has its own t. The samples' t lie evenly over the interval, with one random shift for all
        (MD4's low-discrepancy draw): each is uniform in the interval, and their mean varies less.
        """
        h, cond, kept = self.enter_interval(batch, interval)
        return self.leave(run_layers(layers, h, cond, recompute), cond, kept, batch)

    def enter(self, batch: Batch) -> Entered:
        """The same model as one denoiser of the whole range."""
        return self.enter_interval(batch, Interval(0.0, 1.0))

    def enter_interval(self, batch: Batch, interval: Interval) -> Entered:
        kept = self.drawn(batch["tokens"], interval)
        return Entered(*self.input(batch["tokens"], kept.mask, kept.t), kept)

    def drawn(self, tokens: Tensor, interval: Interval) -> MaskedTokens:
        """The levels and masks of tokens [B, L]."""
        size, length = len(tokens), interval.high - interval.low
        shift = torch.rand(1, device=tokens.device)
        t = interval.low + length * ((shift + torch.arange(size, device=tokens.device) / size) % 1)
        t = t.clamp(min=T_MIN)
        mask = torch.rand(tokens.shape, device=tokens.device) < self.masked_share(t)[:, None]
        return MaskedTokens(mask, t, length)

    def leave(self, h: Tensor, cond: Tensor, kept: MaskedTokens, batch: Batch) -> Tensor:
        loss = self.head_losses(self.model.output_part(h, cond), batch["tokens"])
        return kept.length * self.weighted_mean(loss, kept.mask, kept.t)

    def weighted_mean(self, loss: Tensor, mask: Tensor, t: Tensor) -> Tensor:
        """[B], of a loss per token [B, L]: w(t) times the sum over masked tokens, over L."""
        # a product, not a selection: the planner needs shapes that no data decide
        return weighted((loss * mask).mean(1), self.weight(t))

    def losses(
        self, layers: Iterable[nn.Module], context: Tensor, mask: Tensor, t: Tensor, tokens: Tensor
    ) -> Tensor:
        """Cross-entropy of each of `tokens` [B, L], masked or not, from the unmasked ones of `context` [B,
        L].
        """
        return self.head_losses(self.features(layers, context, mask, t), tokens)

    def head_losses(self, features: Tensor, tokens: Tensor) -> Tensor:
        """[B, L], from features [B, L, D]; logits in chunks."""

        def loss(part: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(part), target, reduction="none")

        return in_chunks(loss, self.head_chunk, features.flatten(0, -2), tokens.flatten()).view(tokens.shape)

    def input(self, tokens: Tensor, mask: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The input part. The model sees t as EDM's c_noise = ln(t) / 4: small t differ by their ratio."""
        return self.model.input_part(
            {"tokens": tokens}, tokens.masked_fill(mask, self.mask_token), c_noise(t)
        )

    def features(self, layers: Iterable[nn.Module], tokens: Tensor, mask: Tensor, t: Tensor) -> Tensor:
        """[B, L, D] before the head, at all positions."""
        h, cond = self.input(tokens, mask, t)
        return self.model.output_part(run_layers(layers, h, cond), cond)

    def logits(self, features: Tensor) -> Tensor:
        """[N, V] in fp32, for features [N, D]."""
        return self.model.logits(features).float()
