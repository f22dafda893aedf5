"""An arena while it is trained, and the flat vectors that training needs beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowmem import optim
from lowmem.arena import Arena, ArenaLayout, bind, parameter_views
from lowmem.config import OptimizerConfig

SHARED = -1  # the place of the shared part


@dataclass
class Trainable:
    """An arena with its weights in the compute dtype, and their gradients, both flat."""

    arena: Arena
    compute: Tensor  # the weights themselves in fp32, a copy of them in bf16
    grads: Tensor

    def bind(self, model: nn.Module, frozen: bool = False) -> None:
        """`frozen`: for a pass without gradients."""
        if self.compute.dtype != torch.float32:
            self.compute.copy_(self.arena.weights)
        layout = self.arena.layout
        if not frozen:
            self.grads.zero_()
        bind(model, parameter_views(layout, self.compute), None if frozen else parameter_views(layout, self.grads))

    def update(self, step: int, lr: float, config: OptimizerConfig, factor: Tensor | None = None) -> None:
        """One optimizer step, `step` from 1; the gradients are zero again afterwards. `factor`: see `optim.update`."""
        optim.update(self.arena.layout, self.arena.weights, self.grads, self.arena.state, step, lr, config, factor)
        if self.compute.dtype != torch.float32:
            self.compute.copy_(self.arena.weights)
        self.grads.zero_()


class Scratch:
    """Flat vectors kept for the whole run, one of each use for the shared part and for each place that a block can take on the device."""

    def __init__(self, layouts: list[ArenaLayout], shared_layout: ArenaLayout, dtype: torch.dtype, device: torch.device) -> None:
        self._block_numel, self._shared_numel = max(layout.numel for layout in layouts), shared_layout.numel
        self._dtype, self._device = dtype, device
        self._kept: dict[tuple[str, int], Tensor] = {}

    def trainable(self, place: int, layout: ArenaLayout, buffer: Tensor) -> Trainable:
        """`place`: SHARED, or the block's place among those of its visit."""
        arena = Arena(layout, buffer)
        compute = arena.weights if self._dtype == torch.float32 else self._flat("compute", place)[: layout.numel]
        return Trainable(arena, compute, self._flat("grads", place)[: layout.numel])

    def _flat(self, use: str, place: int) -> Tensor:
        if (use, place) not in self._kept:
            numel = self._shared_numel if place == SHARED else self._block_numel
            self._kept[use, place] = torch.zeros(numel, dtype=self._dtype, device=self._device)
        return self._kept[use, place]
