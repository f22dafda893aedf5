"""Passes of micro-batches through a model of which only a piece is on the device.

A piece is a run of layers: a unit, or a block. What crosses the borders between pieces is kept. In the
backward pass a piece's forward is made again from its border, with the random draws of the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.blocks.borders import RANDOM_STATE_BYTES, Borders
from lowmem.blocks.order import WHOLE, Course
from lowmem.machine.device import Device
from lowmem.objectives.base import Batch, Kept, Objective
from lowmem.training.attempt import Attempt
from lowmem.training.roots import backward_from, scaled


@dataclass
class Part:
    """A micro-batch on its way through the model."""

    index: int  # its place among those that are under way
    seed: int  # of its draws
    batch: Batch
    cond: Tensor
    kept: Kept
    cond_grad: Tensor | None = None  # as far as the backward pass has come
    loss: Tensor | None = None


class BorderPasses:
    """Enters micro-batches, takes them through the pieces, and back."""

    def __init__(
        self, attempt: Attempt, objective: Objective[Any, Any], borders: Borders, pieces: Sequence[range]
    ) -> None:
        """`objective`: bound to the attempt's model. `pieces`: the layers of each."""
        self.model, self.objective, self.borders = attempt.model, objective, borders
        self._monitor, self._pieces = attempt.monitor, pieces
        self._optimizer = attempt.plan.recipe.optimizer
        # Where rows are kept from step to step, so are the states at their entry.
        self._states = RandomStates(
            borders.rows if borders.kept else len(pieces), borders.parts, attempt.device
        )
        self._course = WHOLE

    def begin(self, course: Course = WHOLE) -> None:
        """A step begins."""
        self._course = course
        self.borders.begin(course)

    @torch.no_grad()
    def enter(self, index: int, seed: int, batch: Batch) -> Part:
        torch.manual_seed(seed)
        h, cond, kept = self.objective.enter(batch)
        if not self._course.first:
            self._put(0, index, h)
        return Part(index, seed, batch, cond, kept)

    @torch.no_grad()
    def forward(self, piece: int, part: Part) -> None:
        h = self._get(piece, part.index)
        out = self.objective.through(self._layers(piece), h, part.cond, part.kept)
        self._put(piece + 1, part.index, out)

    def backward(self, piece: int, part: Part, micro_batches: int, between: Callable[[], None]) -> None:
        """Adds to the gradients of the piece's parameters. `micro_batches`: of a step, whose mean the loss
        is. `between`: is called between the forward pass and the backward pass.
        """
        count, last = len(self._pieces), piece == len(self._pieces) - 1
        h = self._get(piece, part.index).detach().requires_grad_()
        cond = part.cond.detach().requires_grad_()
        out = self.objective.through(self._layers(piece), h, cond, part.kept)
        between()
        self._monitor.sample()  # activations are at their most
        if last:
            loss = self.objective.leave(out, cond, part.kept, part.batch).mean() / micro_batches
            part.loss = loss.detach()
            scaled(loss, self._optimizer).backward()  # type: ignore[no-untyped-call]
            del loss
        else:
            backward_from((out, self.borders.get((count, part.index))), (cond, part.cond_grad))
        del out
        assert h.grad is not None
        self.borders.put((count, part.index), h.grad)
        part.cond_grad = cond.grad

    def backward_of_input(self, part: Part) -> None:
        torch.manual_seed(part.seed)
        h, cond, _ = self.objective.enter(part.batch)
        backward_from((h, self.borders.get((len(self._pieces), part.index))), (cond, part.cond_grad))

    def _put(self, piece: int, index: int, h: Tensor) -> None:
        row = self._course.row(piece)
        self.borders.put((row, index), h)
        self._states.save(row, index)

    def _get(self, piece: int, index: int) -> Tensor:
        row = self._course.row(piece)
        self._states.restore(row, index)
        return self.borders.get((row, index))

    def _layers(self, piece: int) -> list[nn.Module]:
        return [self.model.layers[index] for index in self._pieces[piece]]


def total_loss(parts: Sequence[Part], device: torch.device) -> Tensor:
    """The mean loss of a step, from its micro-batches."""
    total = torch.zeros((), device=device)
    for part in parts:
        assert part.loss is not None
        total += part.loss
    return total


class RandomStates:
    """The generators' states at the entry of every piece, for every micro-batch.

    They have memory of their own for the whole run. A tensor for each state would lie amid freed activations,
    and the C library's heap would grow around it.
    """

    def __init__(self, num_pieces: int, parts: int, device: Device) -> None:
        self._device, own = device, device.random_state()
        self._cpu = torch.empty(num_pieces, parts, RANDOM_STATE_BYTES, dtype=torch.uint8)
        self._own = None if own is None else torch.empty(num_pieces, parts, len(own), dtype=torch.uint8)

    def save(self, piece: int, part: int) -> None:
        self._cpu[piece, part] = torch.get_rng_state()
        own = self._device.random_state()
        if self._own is not None and own is not None:
            self._own[piece, part] = own

    def restore(self, piece: int, part: int) -> None:
        torch.set_rng_state(self._cpu[piece, part].clone())  # it reads a storage from its start
        if self._own is not None:
            self._device.set_random_state(self._own[piece, part].clone())
