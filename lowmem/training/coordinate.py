"""Block coordinate steps: exact gradients of the whole model's loss, for one block at a time.

    forward     blocks before the visited one | the visited block | blocks after it
    backward                                    the visited block | blocks after it, for their inputs alone

The visited block is on the device whole for a visit of many steps, with its gradients and its optimizer
state. Of the others only the weights are read, and where the model does not fit they come and go unit by
unit. Nothing but the visited block and the shared part is written, once a visit.

Blocks before the visited one do not change in a visit. So where a batch comes back in it
(`blocks.visit_batches`), what has left them is kept, and they are not fetched again.

The shared part: parameters that only the output part uses (the head) are trained in every step. Their
gradient is there anyway. All others, a table that both parts use among them, are trained in the visits of
block 0, whose backward pass comes to the input part. In other visits it would have to pass all the blocks
before the visited one for them, and their inputs could not be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lowmem.blocks.arena import bind, unbind
from lowmem.blocks.order import Course, Visit
from lowmem.objectives.base import Batch, Objective
from lowmem.recipe import OptimizerConfig
from lowmem.training.attempt import Attempt
from lowmem.training.border_passes import BorderPasses, total_loss
from lowmem.training.shared_use import shared_use
from lowmem.training.unit_weights import UnitWeights


class Coordinate:
    """What a visit needs beside its block: the other blocks, and the shared part's steps."""

    def __init__(self, attempt: Attempt, objective: Objective[Any, Any]) -> None:
        """`objective`: bound to the attempt's model."""
        self._attempt, self._model, self._shared = attempt, attempt.model, attempt.shared
        self._queue, names = attempt.queue, {slot.name for slot in attempt.shared_layout.slots}
        use = shared_use(attempt, objective)
        self._of_output = use.by_output - use.by_input
        self._others = names - self._of_output
        self._weights: UnitWeights | None = None  # None: all blocks are on the device
        if attempt.units is not None and attempt.borders is not None:
            self._weights = UnitWeights(attempt)
            self._passes = BorderPasses(attempt, objective, attempt.borders, self._model.units())
            self._block_of = [int(unit.key.rpartition("-")[2]) for unit in attempt.units.units]

    def begin_visit(self, visit: Visit) -> None:
        """The visit's block is bound."""
        self._visit, self._block = visit, visit.blocks[0]
        trained = self._of_output if self._block else self._of_output | self._others
        for name in self._of_output | self._others:
            self._model.get_parameter(name).requires_grad_(name in trained)
        if self._weights is None:
            for block, layout in enumerate(self._attempt.layouts):
                if block != self._block:
                    buffer = self._attempt.stream.load(block)
                    self._attempt.scratch.to_read(block, layout, buffer).bind_to_read(self._model)

    @property
    def streams(self) -> bool:
        return self._weights is not None

    # --------------------------------------------------------------------------------------------------------
    # Gradients of a model that streams

    def forward_backward(self, step: int, micro: Sequence[tuple[int, Batch]]) -> Tensor:
        """Gradients of a step's mean loss, over micro-batches with their seeds. Returns that loss."""
        course, last = self._course(step), len(self._block_of) - 1
        self._passes.begin(course)
        parts = [self._passes.enter(index, seed, batch) for index, (seed, batch) in enumerate(micro)]
        forward = list(range(course.first, last))
        order = [*forward, *reversed(range(course.lowest, last + 1))]
        for place, unit in enumerate(order):
            self._bring(order, place)
            for part in parts:
                if place < len(forward):
                    self._passes.forward(unit, part)
                else:
                    self._passes.backward(unit, part, len(parts), lambda: None)
            if self._weights is not None and self._moves(unit):
                self._weights.let_go(unit)
        for part in parts if not course.lowest else ():
            self._passes.backward_of_input(part)
        return total_loss(parts, self._attempt.device.torch)

    def _course(self, step: int) -> Course:
        first, kept = self._block_of.index(self._block), self._queue.kept_batches
        if not kept or not first:
            return Course(lowest=first)
        turn, place = divmod(step - self._visit.first_step, kept)
        return Course(lowest=first, first=first if turn else 0, entry=len(self._block_of) + 1 + place)

    def _moves(self, unit: int) -> bool:
        return self._block_of[unit] != self._block

    def _bring(self, order: Sequence[int], place: int) -> None:
        """Binds a unit's weights, where it is not the visited block's, and starts to fetch the next one."""
        assert self._weights is not None
        unit = order[place]
        if self._moves(unit):
            bind(self._model, self._weights.views(unit), None)
        following = next((other for other in order[place + 1 :] if self._moves(other)), None)
        if following is not None:
            self._weights.stream.prefetch(following)

    # --------------------------------------------------------------------------------------------------------
    # Steps of the shared part

    def begin(self, step: int, lr: float, config: OptimizerConfig) -> None:
        """`step`: of all blocks together, from 1."""
        self._given = step, lr, config

    def update(self, factor: Tensor | None = None) -> Tensor:
        """Returns a scalar on the device that is finite where the gradients were."""
        step, lr, config = self._given
        self._shared.begin(step, lr, config)
        norm = self._shared.update_some(self._of_output)
        if self._block == 0:
            own = self._visit.first_step + step - self._queue.steps_done(self._visit.index)
            self._shared.begin(own, lr, config)
            norm = norm + self._shared.update_some(self._others)
        return norm

    def weights_norm(self) -> Tensor:
        return self._shared.weights_norm()

    def end_visit(self) -> None:
        if self._weights is None:
            for block, layout in enumerate(self._attempt.layouts):
                if block != self._block:
                    unbind(self._model, layout)
