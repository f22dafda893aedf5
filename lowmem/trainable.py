"""An arena while it is trained, and the flat vectors that training needs beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowmem import optim
from lowmem.arena import Arena, ArenaLayout, bind, parameter_views
from lowmem.config import OptimizerConfig
from lowmem.schedule import mix_seed

SHARED = -1  # the place of the shared part


@dataclass
class Trainable:
    """An arena with its weights in the compute dtype, and their gradients, both flat."""

    arena: Arena
    compute: Tensor  # the weights themselves where they are kept in the compute dtype, else a copy of them
    grads: Tensor
    seed: int  # of the run: bf16 weights are rounded at random

    def bind(self, model: nn.Module) -> None:
        self._refresh()
        self.grads.zero_()
        layout = self.arena.layout
        bind(model, parameter_views(layout, self.compute), parameter_views(layout, self.grads))

    def update(self, step: int, lr: float, config: OptimizerConfig) -> None:
        """One optimizer step, `step` from 1; the gradients are zero again afterwards."""
        optim.update(self.arena, self.grads, optim.Step(step, lr, config, self._rounding(step)))
        self._refresh()
        self.grads.zero_()

    def _refresh(self) -> None:
        if self.compute is not self.arena.weights:
            self.compute.copy_(self.arena.weights)

    def _rounding(self, step: int) -> optim.Rounding | None:
        """A function of the run's seed, of which part of the model this is, and of the step: the same at every tier and after a resumption."""
        weights, names = self.arena.weights, [slot.name for slot in self.arena.layout.slots]
        if weights.dtype == torch.float32:
            return None
        return optim.Rounding(mix_seed(self.seed, "rounding", *names, step), weights.device)


class Scratch:
    """Flat vectors kept for the whole run, one of each use for the shared part and for each place that a block can take on the device."""

    def __init__(self, layouts: list[ArenaLayout], shared_layout: ArenaLayout, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._block_numel, self._shared_numel = max(layout.numel for layout in layouts), shared_layout.numel
        self._dtype, self._device, self._seed = dtype, device, seed
        self._kept: dict[tuple[str, int], Tensor] = {}

    def trainable(self, place: int, layout: ArenaLayout, buffer: Tensor) -> Trainable:
        """`place`: SHARED, or the block's place among those of its visit."""
        arena = Arena(layout, buffer)
        compute = arena.weights if arena.weights.dtype == self._dtype else self._flat("compute", place)[: layout.numel]
        return Trainable(arena, compute, self._flat("grads", place)[: layout.numel], self._seed)

    def _flat(self, use: str, place: int) -> Tensor:
        if (use, place) not in self._kept:
            numel = self._shared_numel if place == SHARED else self._block_numel
            self._kept[use, place] = torch.zeros(numel, dtype=self._dtype, device=self._device)
        return self._kept[use, place]
