"""The shared part of a model whose optimizer state does not fit beside it.

Its arena rests where the blocks rest. On the device are its weights in the compute dtype and their gradients.
At the end of a step its rows come in chunks, as those of a unit do, are updated, and go back. A tensor of a
large vocabulary then takes two numbers a weight in place of four or more. The bits are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowmem.blocks import optim
from lowmem.blocks.arena import ArenaLayout, bind, parameter_views
from lowmem.blocks.unit_stream import UnitStream, Update
from lowmem.recipe import OptimizerConfig
from lowmem.training.trainable import rounding


class Resting:
    """Trains as `Trainable` does, but the arena is in the store of the blocks."""

    def __init__(self, layout: ArenaLayout, stream: UnitStream, dtype: torch.dtype, seed: int) -> None:
        """`stream`: knows the shared part. `dtype`: of compute. Raises StoreError."""
        self._layout, self._stream, self._seed = layout, stream, seed
        device = stream.device.torch
        self.weights = torch.zeros(layout.numel, dtype=dtype, device=device)
        self.grads = torch.zeros(layout.numel, dtype=dtype, device=device)
        self._step: optim.Step | None = None
        stream.read_shared(self._take)

    def bind(self, model: nn.Module) -> None:
        views = (parameter_views(self._layout, flat) for flat in (self.weights, self.grads))
        bind(model, *views)

    def begin(self, step: int, lr: float, config: OptimizerConfig) -> None:
        """Says what the coming backward pass is for. `step` from 1."""
        rounded = rounding(self._layout, self._seed, step, self.weights.device)
        self._step = optim.Step(step, lr, config, rounded)

    def gradient_norm(self) -> Tensor:
        return optim.gradient_norm(self.grads)

    def forget(self) -> None:
        """Drops gradients that are used, or of a pass that was made for their norm alone."""
        self.grads.zero_()

    def weights_norm(self) -> Tensor:
        """Not finite where a weight is not."""
        return optim.gradient_norm(self.weights)

    def update(self, factor: Tensor | None, visits_done: int, durable: bool, norm: Tensor) -> Tensor:
        """The optimizer step. Gradients are zero afterwards, and the weights are the new ones.

        `factor`: see `optim.update`; the others: see `Update`. Returns a scalar on the device that is finite
        where all gradients were.
        """
        assert self._step is not None
        found = optim.clipped(self.grads, self._step.config, factor)
        stream, given = self._stream, self.grads.__getitem__
        update = Update(
            stream.shared, given, self._step, visits_done, durable, norm, self.forget, self._changed
        )
        stream.update(update)
        stream.finish()
        self._step = None
        return found

    def _changed(self, rows: optim.Rows) -> None:
        self._take(slice(rows.first, rows.first + len(rows.weights)), rows.weights)

    def _take(self, rows: slice, weights: Tensor) -> None:
        self.weights[rows].copy_(weights)
