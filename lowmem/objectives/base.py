"""What every objective offers, and the parts that objectives share.

An objective says how a block, and the whole model, is scored. It is bound to its model and its noise when it
is made (`BlockModel.make_objective`), so its methods take only what varies: layers, batch and levels. Every
loss is per sample, [B]; the caller takes the mean. Objectives know models only by the small protocols that
they declare.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.noise import Interval, block_interval, loss_weight, settled_noise
from lowmem.objectives.alike import starts
from lowmem.objectives.recompute import recomputed
from lowmem.recipe import NoiseConfig

Batch = dict[str, Tensor]


class DenoisedModel(Protocol):
    """What every objective needs of a model: the way in and the way out.

    See `lowmem.models.base.BlockModel`.
    """

    def input_part(
        self, batch: Batch, noisy: Tensor | None, c_noise: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...

    def output_part(self, h: Tensor, cond: Tensor) -> Tensor: ...


class TargetTable(DenoisedModel, Protocol):
    """A model whose targets are rows of a table."""

    def target_table(self) -> Tensor:
        """[K, D], rows of length 1: the same table in training and in the sampler."""
        ...


@dataclass(frozen=True)
class Kept:
    """What the input part drew or chose, for the layers and the loss. No gradient flows through it."""

    def tensors(self) -> list[Tensor]:
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


ModelT = TypeVar("ModelT", bound=DenoisedModel)
KeptT = TypeVar("KeptT", bound=Kept)


class Entered(NamedTuple):
    """A micro-batch that has passed the input part of the whole model."""

    h: Tensor  # [B, T, D], the residual stream
    cond: Tensor  # [B, 1 or T, D]
    kept: Any  # the objective's own kind of `Kept`


class Objective(ABC, Generic[ModelT, KeptT]):
    """How a block, and the whole model, is scored.

    `layers` are the layers on the device. With `recompute` their activations are not kept but made again in
    backward. The loss of the whole model is `leave(through(enter))`: three steps, so that its layers may also
    pass a few at a time. Whatever draws at random takes torch's default generator; the same state of it gives
    the same draws.
    """

    draws_with_all_blocks = False  # a draw passes every block, also where blocks are trained alone
    most_chunks: int | None = None  # of logits (see `num_chunks`), for counting; None: all

    def __init__(self, model: ModelT, noise: NoiseConfig) -> None:
        """`noise`: as the recipe has it. A schedule that measures the targets is settled here (see
        `self.noise`).

        Raises ConfigError for a schedule that measures a table of targets where the model has none.
        """
        self.model = model
        self.noise = noise if noise.schedule == "lognormal" else settled_noise(noise, self.target_shape())

    def target_shape(self) -> tuple[int, int] | None:
        """(K, D) of the table of targets, None where targets are no rows of a table."""
        return None

    def interval(self, block: int, num_blocks: int, gamma: float = 0.0) -> Interval:
        """The levels that a block is trained on: sigma, or whatever the objective calls its level."""
        return block_interval(block, num_blocks, self.noise, gamma)

    @abstractmethod
    def block_loss(
        self, layers: Iterable[nn.Module], batch: Batch, interval: Interval, recompute: bool = False
    ) -> Tensor:
        """[B]: the block's denoising loss of one micro-batch, at levels drawn from `interval`."""

    @abstractmethod
    def enter(self, batch: Batch) -> Entered:
        """The input part, and all that the loss of the whole model draws."""

    def through(
        self, layers: Iterable[nn.Module], h: Tensor, cond: Tensor, kept: KeptT, recompute: bool = False
    ) -> Tensor:
        """h [B, T, D] after some of the layers, in their order: one block, or all of them."""
        return run_layers(layers, h, cond, recompute)

    @abstractmethod
    def leave(self, h: Tensor, cond: Tensor, kept: KeptT, batch: Batch) -> Tensor:
        """[B]: the output part and the loss, from h after all layers."""

    def end_to_end_loss(self, layers: Iterable[nn.Module], batch: Batch, recompute: bool = False) -> Tensor:
        """[B]: the loss of the whole model trained by exact back-propagation."""
        h, cond, kept = self.enter(batch)
        return self.leave(self.through(layers, h, cond, kept, recompute), cond, kept, batch)

    def evaluation_call(self, layers: Iterable[nn.Module], batch: Batch) -> object:
        """The call of an evaluation in blocks that takes most memory, for counting it."""
        return self.block_loss(layers, batch, self.interval(0, 1))

    def num_chunks(self, batch_size: int) -> int:
        """In how many parts, all alike, the logits of a micro-batch are made."""
        return 1

    def counted(self) -> Objective[ModelT, KeptT]:
        """The objective whose passes stand for the average one, for counting memory and operations."""
        return self

    def health(self) -> dict[str, float]:
        """Figures that are logged after each visit."""
        return {}


def mean_cosine(table: Tensor) -> float:
    """Mean pairwise cosine of a table's rows [K, D] of length 1. Near 1 the targets have collapsed."""
    count = len(table)
    return float(((table @ table.T).sum() - count) / (count * (count - 1)))


def run_layers(layers: Iterable[nn.Module], h: Tensor, cond: Tensor, recompute: bool = False) -> Tensor:
    for layer in layers:
        h = recomputed(layer, h, cond) if recompute else layer(h, cond)
    return h


def in_chunks(loss: Callable[..., Tensor], size: int, first: Tensor, *others: Tensor | None) -> Tensor:
    """`loss(first, *others)` of N rows, [N], computed for `size` rows at a time.

    What `loss` makes on the way (logits) is not kept; backward makes it again. Every argument has N rows;
    None is handed on as it is. `loss` must draw nothing at random.
    """
    out = []
    # With gradients something of every part stays until backward, so one cannot stand for the others.
    begins = range(0, len(first), size) if torch.is_grad_enabled() else starts(len(first), size)
    for start in begins:
        rows = slice(start, start + size)
        part = (first[rows], *(None if other is None else other[rows] for other in others))
        out.append(recomputed(loss, *part, draws=False))
    losses = torch.cat(out)
    return losses if len(losses) == len(first) else F.pad(losses, (0, len(first) - len(losses)))


def weighted(loss: Tensor, weight: Tensor) -> Tensor:
    """loss * weight per sample.

    Raises ValueError unless the shapes are equal: a broadcast here would undo the weighting.
    """
    if loss.shape != weight.shape:
        raise ValueError(
            f"loss {tuple(loss.shape)} and weight {tuple(weight.shape)} must have the same shape"
        )
    return loss * weight


def at_levels(loss: Tensor, sigma: Tensor, noise: NoiseConfig) -> Tensor:
    """A loss at drawn levels, with the weight that the recipe gives each level. Both have one shape."""
    return weighted(loss, loss_weight(sigma, noise.sigma_data)) if noise.weighting == "edm" else loss


def l2_loss(denoised: Tensor, y: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """w(sigma) ||D - y||^2 / numel, per sample.

    `y` is detached: a learned target would shrink to the estimate.
    """
    per_sample = (denoised - y.detach()).square().flatten(1).mean(1)
    return weighted(per_sample, loss_weight(sigma, sigma_data))
