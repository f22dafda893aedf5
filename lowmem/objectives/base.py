"""What every objective offers, and the parts they share.

Every loss is per sample, [B]; the caller takes the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem.noise import Interval, loss_weight
from lowmem.recipe import NoiseConfig

if TYPE_CHECKING:
    from lowmem.models.base import Batch, BlockModel


class Entered(NamedTuple):
    """A micro-batch that has passed the input part of the whole model."""

    h: Tensor  # [B, T, D], the residual stream
    cond: Tensor  # [B, 1 or T, D]
    kept: dict[str, Any]  # what was drawn, for the layers and the loss: no gradient flows through it


class Objective(Protocol):
    """How a block, and the whole, is scored. `layers` are those on the device; with `recompute` their
    activations are not kept.

    The loss of the whole is `leave(through(enter))`: three steps, so that its layers may also pass a few at a
    time. Whatever draws at random takes torch's default generator; the same state of it gives the same draws.
    """

    def interval(self, block: int, num_blocks: int, noise: NoiseConfig, gamma: float) -> Interval:
        """The levels that a block is trained on (sigma, or whatever the objective calls its level)."""
        ...

    def block_loss(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        batch: Batch,
        interval: Interval,
        noise: NoiseConfig,
        recompute: bool,
    ) -> Tensor:
        """[B]: the block's denoising loss of one micro-batch, at levels drawn from `interval`."""
        ...

    def enter(self, model: BlockModel, batch: Batch, noise: NoiseConfig) -> Entered:
        """The input part, and all that the loss of the whole model draws."""
        ...

    def through(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        h: Tensor,
        cond: Tensor,
        kept: dict[str, Any],
        recompute: bool,
    ) -> Tensor:
        """h [B, T, D] after some of the layers, in their order: one block, or all of them."""
        ...

    def leave(
        self,
        model: BlockModel,
        h: Tensor,
        cond: Tensor,
        kept: dict[str, Any],
        batch: Batch,
        noise: NoiseConfig,
    ) -> Tensor:
        """[B]: the output part and the loss, from h after all layers."""
        ...

    def end_to_end_loss(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        batch: Batch,
        noise: NoiseConfig,
        recompute: bool,
    ) -> Tensor:
        """[B]: the loss of the whole model trained by exact back-propagation."""
        ...

    def health(self, model: BlockModel) -> dict[str, float]:
        """Figures logged after each visit."""
        ...


class WholeLoss:
    """The loss of the whole model, made of an objective's three steps."""

    def enter(self, model: BlockModel, batch: Batch, noise: NoiseConfig) -> Entered:
        raise NotImplementedError

    def through(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        h: Tensor,
        cond: Tensor,
        kept: dict[str, Any],
        recompute: bool,
    ) -> Tensor:
        return run_layers(layers, h, cond, recompute)

    def leave(
        self,
        model: BlockModel,
        h: Tensor,
        cond: Tensor,
        kept: dict[str, Any],
        batch: Batch,
        noise: NoiseConfig,
    ) -> Tensor:
        raise NotImplementedError

    def end_to_end_loss(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        batch: Batch,
        noise: NoiseConfig,
        recompute: bool,
    ) -> Tensor:
        h, cond, kept = self.enter(model, batch, noise)
        return self.leave(
            model, self.through(model, layers, h, cond, kept, recompute), cond, kept, batch, noise
        )


def mean_cosine(table: Tensor) -> float:
    """Mean pairwise cosine of a table's rows [K, D] of length 1: near 1 the targets have collapsed onto each
    other.
    """
    count = len(table)
    return float(((table @ table.T).sum() - count) / (count * (count - 1)))


def run_layers(layers: Iterable[nn.Module], h: Tensor, cond: Tensor, recompute: bool = False) -> Tensor:
    for layer in layers:
        h = checkpoint(layer, h, cond, use_reentrant=False) if recompute else layer(h, cond)
    return h


def in_chunks(loss: Callable[..., Tensor], size: int, first: Tensor, *others: Tensor | None) -> Tensor:
    """`loss(first, *others)` of N rows, [N], for `size` rows at a time: what it makes on the way (logits) is
    not kept, but made again in backward.

    Every argument has N rows; None is handed on as it is. `loss` must draw nothing at random.
    """
    out = []
    for start in range(0, len(first), size):
        rows = slice(start, start + size)
        part = (first[rows], *(None if other is None else other[rows] for other in others))
        out.append(checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(out)


def weighted(loss: Tensor, weight: Tensor) -> Tensor:
    """loss * weight per sample.

    Raises ValueError unless the shapes are equal: a broadcast here would undo the weighting.
    """
    if loss.shape != weight.shape:
        raise ValueError(
            f"loss {tuple(loss.shape)} and weight {tuple(weight.shape)} must have the same shape"
        )
    return loss * weight


def l2_loss(denoised: Tensor, y: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """w(sigma) ||D - y||^2 / numel, per sample.

    `y` is detached: a learned target under L2 would shrink to the estimate.
    """
    per_sample = (denoised - y.detach()).square().flatten(1).mean(1)
    return weighted(per_sample, loss_weight(sigma, sigma_data))
