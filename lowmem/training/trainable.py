"""An arena while it is trained, and the flat vectors that training needs beside it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowmem.blocks import optim
from lowmem.blocks.arena import Arena, ArenaLayout, ParameterSlot, bind, parameter_views
from lowmem.recipe import OptimizerConfig
from lowmem.schedule import mix_seed

SHARED = -1  # the place of the shared part


@dataclass
class Trainable:
    """An arena with its weights in the compute dtype, and their gradients, both flat.

    Without `grads` every parameter is updated during backward, once its own gradient is whole: bit-equal, and
    none waits for another.
    """

    arena: Arena
    compute: Tensor  # the weights themselves where they are kept in the compute dtype, else a copy of them
    grads: Tensor | None
    seed: int  # of the run: bf16 weights are rounded at random
    _step: optim.Step | None = None
    _waiting: dict[str, ParameterSlot] = field(
        default_factory=dict
    )  # parameters not yet updated in this step

    def bind(self, model: nn.Module) -> None:
        self.refresh()
        layout = self.arena.layout
        if self.grads is None:
            bind(model, parameter_views(layout, self.compute), self._on_gradient)
        else:
            self.grads.zero_()
            bind(model, parameter_views(layout, self.compute), parameter_views(layout, self.grads))

    def bind_to_read(self, model: nn.Module) -> None:
        self.refresh()
        bind(model, parameter_views(self.arena.layout, self.compute), None)

    def refresh(self) -> None:
        """Lets compute see weights that were changed in the arena."""
        self._refresh(slice(None))

    def begin(self, step: int, lr: float, config: OptimizerConfig) -> None:
        """Says what the coming backward pass is for. `step` from 1."""
        self._step = optim.Step(
            step, lr, config, rounding(self.arena.layout, self.seed, step, self.arena.weights.device)
        )
        self._waiting = {slot.name: slot for slot in self.arena.layout.slots}

    def gradient_norm(self) -> Tensor:
        """Of a step whose gradients have gathered."""
        assert self.grads is not None
        return optim.gradient_norm(self.grads)

    def forget(self) -> None:
        """Drops the gradients of a pass that was made for their norm alone."""
        assert self.grads is not None
        self.grads.zero_()

    def weights_norm(self) -> Tensor:
        """Not finite where a weight is not."""
        return optim.gradient_norm(self.arena.weights)

    def update(self, factor: Tensor | None = None) -> Tensor:
        """The optimizer step, or what backward has left of it: parameters that the loss did not depend on.
        Gradients are zero again afterwards.

        `factor`: see `optim.update`. Returns a scalar on the device that is finite where all gradients were.
        """
        assert self._step is not None
        if self.grads is None:
            for slot in self._waiting.values():
                self._update_slot(
                    slot,
                    torch.zeros((), dtype=self.compute.dtype, device=self.compute.device).expand(slot.numel),
                )
            norm = self.weights_norm()  # the gradients are gone; what they spoilt is not
        else:
            norm = optim.update(self.arena, self.grads, self._step, factor)
            self.refresh()
            self.grads.zero_()
        self._step = None
        return norm

    def update_some(self, names: Collection[str], keep: bool = False) -> Tensor:
        """The optimizer step of some parameters, whose gradients have gathered and are clipped by their own
        norm. `keep`: the gradients stay, else they are zero afterwards.

        Returns a scalar on the device that is finite where those gradients were.
        """
        assert self.grads is not None and self._step is not None
        found = [
            (slot, self.grads[slot.start : slot.start + slot.numel])
            for slot in self.arena.layout.slots
            if slot.name in names
        ]
        if not found:
            return torch.zeros((), device=self.grads.device)
        norms = torch.stack([optim.gradient_norm(grads) for _, grads in found])
        clips, config = self._step.config.grad_clip is not None, self._step.config
        factor = optim.whole_factor([norms], config) if clips else None
        for slot, grads in found:
            if factor is not None:
                grads.mul_(factor.to(grads.dtype))
            self._update_slot(slot, grads)
            if not keep:
                grads.zero_()
        return optim.gradient_norm(norms)

    def scale(self, names: Collection[str], factor: float) -> None:
        """Scales the gradients of some parameters."""
        assert self.grads is not None
        for slot in self.arena.layout.slots:
            if slot.name in names:
                self.grads[slot.start : slot.start + slot.numel].mul_(factor)

    def _on_gradient(self, name: str, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self._update_slot(self._waiting.pop(name), parameter.grad.flatten())
        parameter.grad = None
        torch.autograd.graph.increment_version(parameter)

    def _update_slot(self, slot: ParameterSlot, grads: Tensor) -> None:
        assert self._step is not None
        optim.update_rows(self.arena, self.arena.layout.group_of(slot), slot.start, grads, self._step)
        self._refresh(slice(slot.start, slot.start + slot.numel))

    def _refresh(self, rows: slice) -> None:
        if self.compute is not self.arena.weights:
            self.compute[rows].copy_(self.arena.weights[rows])


def rounding(layout: ArenaLayout, seed: int, step: int, device: torch.device) -> optim.Rounding | None:
    """How a step rounds bf16 weights.

    It is a function of the run's seed, of which part of the model this is, and of the step: the same at every
    tier and after a resumption.
    """
    if layout.weights_dtype == torch.float32:
        return None
    return optim.Rounding(mix_seed(seed, "rounding", *(slot.name for slot in layout.slots), step), device)


class Scratch:
    """Flat vectors kept for the whole run, one of each use for the shared part and for each place that a
    block can take on the device.

    `together`: all blocks are on the device, so a place is always the same block's; else every block comes
    to the same place. `in_turns`: they are trained one at a time all the same, so that gradients have one
    place.
    """

    def __init__(
        self,
        layouts: list[ArenaLayout],
        shared_layout: ArenaLayout,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        during_backward: bool,
        together: bool = False,
        in_turns: bool = False,
    ) -> None:
        numels = [layout.numel for layout in layouts]
        self.together, self._turn_numel = together, max(numels) if in_turns else None
        self._numels = {SHARED: shared_layout.numel, **dict(enumerate(numels if together else [max(numels)]))}
        self.dtype, self._device, self._seed, self._during_backward = dtype, device, seed, during_backward
        self._kept: dict[tuple[str, int], Tensor] = {}

    def trainable(self, place: int, layout: ArenaLayout, buffer: Tensor) -> Trainable:
        """`place`: SHARED, or the block's place among those of its visit."""
        trainable = self.to_read(place, layout, buffer)
        if not self._during_backward:
            turn = self._turn_numel if place != SHARED else None
            numel = self._numels[place] if turn is None else turn
            grads = self._flat("grads", place if turn is None else 0, numel)
            trainable.grads = grads[: layout.numel]
        return trainable

    def to_read(self, place: int, layout: ArenaLayout, buffer: Tensor) -> Trainable:
        """The same without gradients, for `bind_to_read`."""
        arena = Arena(layout, buffer)
        if arena.weights.dtype == self.dtype:
            return Trainable(arena, arena.weights, None, self._seed)
        copy = self._flat("compute", place, self._numels[place])
        return Trainable(arena, copy[: layout.numel], None, self._seed)

    def _flat(self, use: str, place: int, numel: int) -> Tensor:
        if (use, place) not in self._kept:
            self._kept[use, place] = torch.zeros(numel, dtype=self.dtype, device=self._device)
        return self._kept[use, place]
