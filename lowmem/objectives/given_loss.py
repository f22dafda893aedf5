"""A loss that the user gives, of a model trained end to end: from the model's output and the target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from lowmem.errors import ConfigError
from lowmem.noise import Interval
from lowmem.objectives.base import Batch, DenoisedModel, Entered, Kept, Objective, run_layers
from lowmem.objectives.recompute import recomputed


class Scored(DenoisedModel, Protocol):
    """A model that brings its own loss."""

    def enter(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """h before the first layer, and the condition of the layers, where they take one."""
        ...

    def score(self, output: Tensor, batch: Batch) -> Tensor:
        """A loss for each sample [B], or their mean []."""
        ...


@dataclass(frozen=True)
class Conditioned(Kept):
    """Whether layers take a condition beside h."""

    conditioned: bool


class GivenLoss(Objective[Scored, Conditioned]):
    """The loss of the whole model. It knows no noise levels, so blocks cannot be trained alone."""

    def block_loss(
        self, layers: Iterable[nn.Module], batch: Batch, interval: Interval, recompute: bool = False
    ) -> Tensor:
        raise ConfigError(
            "method: found diffusion_blocks; allowed with a model of lowmem.wrap: end_to_end, because its "
            "loss knows no noise levels; change it, or write a lowmem.BlockModel with another objective"
        )

    def enter(self, batch: Batch) -> Entered:
        h, cond = self.model.enter(batch)
        if cond is None:
            return Entered(h, h.new_zeros(len(h), 1, 1), Conditioned(False))
        return Entered(h, cond, Conditioned(True))

    def through(
        self, layers: Iterable[nn.Module], h: Tensor, cond: Tensor, kept: Conditioned, recompute: bool = False
    ) -> Tensor:
        if kept.conditioned:
            return run_layers(layers, h, cond, recompute)
        for layer in layers:
            h = recomputed(partial(layer), h) if recompute else layer(h)
        return h

    def leave(self, h: Tensor, cond: Tensor, kept: Conditioned, batch: Batch) -> Tensor:
        loss, rows = self.model.score(self.model.output_part(h, cond), batch), len(h)
        if loss.ndim and loss.shape != (rows,):
            raise ConfigError(
                f"loss: found numbers of shape {list(loss.shape)}; allowed: one for each sample, [{rows}], "
                "or their mean; take the mean of the others"
            )
        return loss.expand(rows)
