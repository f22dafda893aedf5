"""Binds the weights of units that come and go, in the dtype of compute."""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.blocks.arena import unbind
from lowmem.blocks.unit_stream import UnitStream
from lowmem.models.base import BlockModel
from lowmem.planning.settings import COMPUTE_DTYPE
from lowmem.training.attempt import Attempt


class UnitWeights:
    def __init__(self, attempt: Attempt) -> None:
        assert attempt.units is not None
        self.stream: UnitStream = attempt.units
        self._model: BlockModel = attempt.model
        self._copy: Tensor | None = None  # of a unit's weights, where they are not in the compute dtype
        dtype = COMPUTE_DTYPE[attempt.plan.settings.precision]
        if attempt.layouts[0].weights_dtype not in (dtype, torch.uint8):  # bytes compute as they are
            largest = max(unit.numel for unit in self.stream.units)
            self._copy = torch.zeros(largest, dtype=dtype, device=attempt.device.torch)

    def views(self, unit: int) -> dict[str, Tensor]:
        """The unit's parameters in the compute dtype, from the weights that are on the device now."""
        layout, pieces = self.stream.units[unit], self.stream.load(unit)
        if self._copy is not None:
            copies = layout.split(self._copy)
            for copy, weights in zip(copies, pieces, strict=True):
                copy.copy_(weights)
            pieces = copies
        return layout.views(pieces)

    def let_go(self, unit: int, update_follows: bool = False) -> None:
        """`update_follows`: see `UnitStream.release`."""
        unbind(self._model, self.stream.units[unit])
        self.stream.release(unit, update_follows)
