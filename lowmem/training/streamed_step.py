"""Exact back-propagation with one unit of the model on the device at a time.

    forward     input part | unit 0 | unit 1 | ...     keeps what crosses the borders between units
    backward    last unit and the loss | ... | unit 1 | unit 0 | input part again

A unit is one layer, or the core of a recurrent model. All micro-batches of a step pass a unit before the next
unit is fetched, so a step moves the same bytes whatever its batch. In the backward pass a unit's forward is
made again from its border, so the passes are those of activation checkpointing layer by layer. A unit's
gradients, summed over the micro-batches, wait for its update alone. Where a norm over a block clips them, the
block's gradients gather first.

The bits are those of plain autograd through the whole model:
  * Every unit is entered with the generator's state of the forward pass, so dropout and all draws repeat.
  * All layers use `cond`, and autograd adds its gradients up in the order of the backward pass. Here `cond`
    is a root of each unit's backward pass beside the unit's output, and the sum so far is its gradient.
    So the sum goes on in the same order.
  * Parameters of the shared part that both the input and the output part use (a tied table) get the same sum.
    Over several micro-batches the output parts' gradients come first here, and alternate with the others in
    plain autograd. The two differ by rounding in that case alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowmem.blocks import optim
from lowmem.blocks.arena import HasSlots, bind, gaps, gathered_in, parameter_views
from lowmem.blocks.borders import Borders
from lowmem.blocks.order import Course
from lowmem.blocks.unit import Unit
from lowmem.blocks.unit_stream import GRADIENTS, Update, gathers_by_block
from lowmem.objectives.base import Batch, Objective
from lowmem.planning.settings import COMPUTE_DTYPE
from lowmem.training.attempt import Attempt
from lowmem.training.border_passes import BorderPasses, Part, total_loss
from lowmem.training.finite import FiniteWatch
from lowmem.training.resting import Resting
from lowmem.training.trainable import Trainable, rounding
from lowmem.training.unit_weights import UnitWeights


@dataclass
class Gathered:
    """Gradients of one unit, or of the units of one block together."""

    block: int
    whole: Tensor  # the vector that holds them, and may be larger
    numel: int
    units: list[int] = field(default_factory=list)  # in the order of the backward pass

    @property
    def flat(self) -> Tensor:
        """[numel], in the order of the unit's own flat vectors, or of the block's."""
        return self.whole[: self.numel]


class StreamedStep:
    """Optimizer steps of a whole model whose units come and go."""

    steps_at_once = 1

    def __init__(
        self, attempt: Attempt, objective: Objective[Any, Any], borders: Borders, watch: FiniteWatch
    ) -> None:
        """`objective`: bound to the attempt's model. `borders`: where the attempt keeps activations."""
        assert attempt.units is not None
        self.watch, self.borders, self.model = watch, borders, attempt.model
        self.shared: Trainable | Resting = attempt.resting or attempt.shared
        self.recipe, self.layouts, self.stream = attempt.plan.recipe, attempt.layouts, attempt.units
        self.units, device = self.stream.units, self.stream.device
        self._learning_rate = attempt.learning_rate
        self.passes = BorderPasses(attempt, objective, borders, self.model.units())
        # Blocks by key, as the units name them.
        self.block_of = [int(unit.key.rpartition("-")[2]) for unit in self.units]
        dtype = COMPUTE_DTYPE[attempt.plan.settings.precision]
        self._frozen = attempt.plan.settings.frozen is not None  # units have neither gradients nor updates
        # The first unit that holds trained weights, or whose input has a gradient that is used.
        trained = self.model.first_trained
        self._lowest = sum(run.stop <= trained for run in self.model.units())
        self._course = Course(lowest=min(self._lowest, len(self.units) - 1))
        self._by_block = gathers_by_block(self.recipe.optimizer.grad_clip)
        numel = max(part.numel for part in (self.layouts if self._by_block else self.units))
        count = 0 if self._frozen else GRADIENTS
        self._free = [torch.zeros(numel, dtype=dtype, device=device.torch) for _ in range(count)]
        self._weights = UnitWeights(attempt)

    def train(
        self, micro: Sequence[Sequence[tuple[int, Batch]]], step: int, visits_done: int, durable: bool
    ) -> list[Tensor]:
        """One step, the only one in `micro`, over micro-batches, each with its seed.

        Returns the mean loss, on the device. `durable`: the step ends a visit, and its files are to be
        committed under `visits_done`.
        """
        optimizer, factor, last = self.recipe.optimizer, None, len(self.units) - 1
        lr = self._learning_rate(step)
        self.passes.begin(self._course)
        self.shared.begin(step + 1, lr, optimizer)
        parts = [self.passes.enter(index, seed, batch) for index, (seed, batch) in enumerate(micro[0])]
        for unit in range(last):
            self._forward(unit, parts)

        if optimizer.clips_whole:
            factor = self._factor(parts, step)
        norm = torch.zeros((), device=self.stream.device.torch)  # of the weights that become durable
        for gathered in self._gradients(parts):
            self.watch.look(step, optim.clipped(gathered.flat, optimizer, factor))
            self._update(gathered, step, lr, factor, visits_done, durable, norm)
        self._backward_of_input(parts)
        if isinstance(self.shared, Resting):
            found = self.shared.update(factor, visits_done, durable, norm)
        else:
            found = self.shared.update(factor)
        self.watch.look(step, found, self.shared.weights_norm())
        if durable:
            self.stream.finish()
            self.watch.look(step, norm)
        total = total_loss(parts, self.stream.device.torch)
        self.watch.look(step, total)
        return [total]

    def _factor(self, parts: list[Part], step: int) -> Tensor:
        """What clips the whole model's gradients: a backward pass of its own finds their norm."""
        norms = {}
        for gathered in self._gradients(parts, following=len(self.units) - 1, updates=False):
            norms[gathered.block] = optim.gradient_norm(gathered.flat)
            self._free.append(gathered.whole)
        self._backward_of_input(parts)
        every = [*(norms[block] for block in sorted(norms)), self.shared.gradient_norm()]
        self.watch.look(step, *every)
        self.shared.forget()
        return optim.whole_factor(every, self.recipe.optimizer)

    # --------------------------------------------------------------------------------------------------------
    # Gradients and updates

    def _gradients(
        self, parts: list[Part], following: int | None = None, updates: bool = True
    ) -> Iterator[Gathered]:
        """The gradients of the backward pass, by unit or by block, each as soon as it is complete.

        `following`: the unit that is needed after the pass. `updates`: its units are updated with them.
        """
        gathered: Gathered | None = None
        lowest = self._course.lowest  # the last unit makes the loss
        for unit in reversed(range(lowest, len(self.units))):
            block = self.block_of[unit]
            if self._frozen:
                self._backward(unit, unit - 1 if unit > lowest else following, None, parts)
                self._weights.let_go(unit)
                continue
            if gathered is None:
                layout = self.layouts[block] if self._by_block else self.units[unit]
                gathered = Gathered(block, self._vector(), layout.numel)
                for gap in gaps(layout, layout.numel):  # it may have held other gradients
                    gathered.flat[gap].zero_()
            gathered.units.append(unit)
            self._backward(unit, unit - 1 if unit else following, gathered, parts)
            self._weights.let_go(unit, updates)
            if not self._by_block or unit == 0 or self.block_of[unit - 1] != block:
                yield gathered
                gathered = None

    def _vector(self) -> Tensor:
        while not self._free:  # an update still reads them
            self.stream.wait()
        return self._free.pop()

    def _update(
        self,
        gathered: Gathered,
        step: int,
        lr: float,
        factor: Tensor | None,
        visits_done: int,
        durable: bool,
        norm: Tensor,
    ) -> None:
        """Hands gradients, clipped already, to the updates of their units."""
        left = len(gathered.units)

        def done() -> None:
            nonlocal left
            left -= 1
            if not left:
                self._free.append(gathered.whole)

        for index in gathered.units:
            unit = self.units[index]

            def given(rows: slice, unit: Unit = unit) -> Tensor:
                first = rows.start if self._by_block else unit.place(rows.start)
                return gathered.flat[first : first + rows.stop - rows.start]

            rounded = rounding(unit.layout, self.recipe.train.seed, step + 1, self.stream.device.torch)
            the_step = optim.Step(step + 1, lr, self.recipe.optimizer, rounded)
            self.stream.update(Update(index, given, the_step, visits_done, durable, norm, done))

    # --------------------------------------------------------------------------------------------------------
    # Passes

    def _forward(self, unit: int, parts: list[Part]) -> None:
        bind(self.model, self._weights.views(unit), None)
        self.stream.prefetch(unit + 1)
        for part in parts:
            self.passes.forward(unit, part)
            self.stream.advance()
        self._weights.let_go(unit)

    def _backward(
        self, unit: int, following: int | None, gathered: Gathered | None, parts: list[Part]
    ) -> None:
        """Adds the unit's gradients to what is gathered; None: it has none. `following`: the unit that is
        needed next.
        """
        weights = self._weights.views(unit)
        if following is not None:
            self.stream.prefetch(following)
        grads = self._bind(unit, weights, gathered)
        for part in parts:
            self.passes.backward(unit, part, len(parts), self.stream.advance)
        for name, grad in grads.items():
            if self.model.get_parameter(name).grad is None:  # the loss does not depend on it
                grad.zero_()

    def _bind(self, unit: int, weights: dict[str, Tensor], gathered: Gathered | None) -> dict[str, Tensor]:
        """Returns where the unit's gradients gather."""
        if gathered is None:
            bind(self.model, weights, None)
            return {}
        layout: HasSlots = self.layouts[gathered.block] if self._by_block else self.units[unit]
        views = parameter_views(layout, gathered.flat)
        grads = {name: views[name] for name in weights}
        # Updates of other units go on while this one computes.
        bind(self.model, weights, gathered_in(grads, self.stream.advance))
        return grads

    def _backward_of_input(self, parts: list[Part]) -> None:
        if self._lowest:  # nothing that is trained is in the input part
            return
        for part in parts:
            self.passes.backward_of_input(part)
