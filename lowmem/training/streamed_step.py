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
from torch import Tensor, nn

from lowmem.blocks import optim
from lowmem.blocks.arena import HasSlots, bind, parameter_views, unbind
from lowmem.blocks.borders import RANDOM_STATE_BYTES, Borders
from lowmem.blocks.unit import Unit
from lowmem.blocks.unit_stream import GRADIENTS, Update, gathers_by_block
from lowmem.machine.device import Device
from lowmem.objectives.base import Batch, Kept, Objective
from lowmem.planning.settings import COMPUTE_DTYPE
from lowmem.training.attempt import Attempt
from lowmem.training.finite import FiniteWatch
from lowmem.training.roots import backward_from
from lowmem.training.trainable import rounding


@dataclass
class Part:
    """A micro-batch on its way through the model."""

    seed: int  # of its draws
    batch: Batch
    cond: Tensor
    kept: Kept
    cond_grad: Tensor | None = None  # as far as the backward pass has come
    loss: Tensor | None = None


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

    def __init__(
        self, attempt: Attempt, objective: Objective[Any, Any], borders: Borders, watch: FiniteWatch
    ) -> None:
        """`objective`: bound to the attempt's model. `borders`: where the attempt keeps activations."""
        assert attempt.units is not None
        self.watch, self.objective, self.borders = watch, objective, borders
        self.model, self.shared, self.monitor = attempt.model, attempt.shared, attempt.monitor
        self.recipe, self.layouts, self.stream = attempt.plan.recipe, attempt.layouts, attempt.units
        self.units, device = self.stream.units, self.stream.device
        self.states = RandomStates(len(self.units), borders.parts, device)
        # Blocks by key, as the units name them.
        self.block_of = [int(unit.key.rpartition("-")[2]) for unit in self.units]
        self._ranges = self.model.units()
        dtype = COMPUTE_DTYPE[attempt.plan.settings.precision]
        self._frozen = attempt.plan.settings.frozen is not None  # units have neither gradients nor updates
        # The first unit that holds trained weights, or whose input has a gradient that is used.
        trained = self.model.first_trained
        self._lowest = sum(run.stop <= trained for run in self._ranges)
        self._by_block = gathers_by_block(self.recipe.optimizer.grad_clip)
        numel = max(part.numel for part in (self.layouts if self._by_block else self.units))
        count = 0 if self._frozen else GRADIENTS
        self._free = [torch.zeros(numel, dtype=dtype, device=device.torch) for _ in range(count)]
        self._copy: Tensor | None = None  # of a unit's weights, where they are not in the compute dtype
        if self.layouts[0].weights_dtype not in (dtype, torch.uint8):  # bytes compute as they are
            largest = max(unit.numel for unit in self.units)
            self._copy = torch.zeros(largest, dtype=dtype, device=device.torch)

    def step(
        self,
        micro: Sequence[tuple[int, Batch]],
        step: int,
        lr: float,
        visits_done: int,
        durable: bool,
    ) -> Tensor:
        """One step over micro-batches, each with its seed. Returns the mean loss, on the device.

        `durable`: the step ends a visit, and its files are to be committed under `visits_done`.
        """
        optimizer, factor, last = self.recipe.optimizer, None, len(self.units) - 1
        self.borders.begin()
        self.shared.begin(step + 1, lr, optimizer)
        parts = [self._enter(index, seed, batch) for index, (seed, batch) in enumerate(micro)]
        for unit in range(last):
            self._forward(unit, parts)

        if optimizer.clips_whole:
            factor = self._factor(parts, step)
        norms: list[Tensor] = []
        for gathered in self._gradients(parts):
            self.watch.look(step, optim.clipped(gathered.flat, optimizer, factor))
            self._update(gathered, step, lr, factor, visits_done, durable, norms)
        self._backward_of_input(parts)
        self.watch.look(step, self.shared.update(factor), self.shared.weights_norm())
        if durable:
            self.stream.finish()
            if norms:
                self.watch.look(step, *norms)
        total = torch.zeros((), device=self.stream.device.torch)
        for part in parts:
            assert part.loss is not None
            total += part.loss
        self.watch.look(step, total)
        return total

    def _factor(self, parts: list[Part], step: int) -> Tensor:
        """What clips the whole model's gradients: a backward pass of its own finds their norm."""
        norms = {}
        for gathered in self._gradients(parts, following=len(self.units) - 1):
            norms[gathered.block] = optim.gradient_norm(gathered.flat)
            self._free.append(gathered.whole)
        self._backward_of_input(parts)
        every = [*(norms[block] for block in sorted(norms)), self.shared.gradient_norm()]
        self.watch.look(step, *every)
        self.shared.forget()
        return optim.whole_factor(every, self.recipe.optimizer)

    # --------------------------------------------------------------------------------------------------------
    # Gradients and updates

    def _gradients(self, parts: list[Part], following: int | None = None) -> Iterator[Gathered]:
        """The gradients of the backward pass, by unit or by block, each as soon as it is complete.

        `following`: the unit that is needed after the pass.
        """
        gathered: Gathered | None = None
        lowest = min(self._lowest, len(self.units) - 1)  # the last unit makes the loss
        for unit in reversed(range(lowest, len(self.units))):
            block = self.block_of[unit]
            if self._frozen:
                self._backward(unit, unit - 1 if unit > lowest else following, None, parts)
                continue
            if gathered is None:
                layout = self.layouts[block] if self._by_block else self.units[unit]
                gathered = Gathered(block, self._vector(), layout.numel)
                gathered.flat.zero_()
            gathered.units.append(unit)
            self._backward(unit, unit - 1 if unit else following, gathered, parts)
            if not self._by_block or unit == 0 or self.block_of[unit - 1] != block:
                yield gathered
                gathered = None

    def _vector(self) -> Tensor:
        while not self._free:  # an update still reads them
            self.stream.finish_first()
        return self._free.pop()

    def _update(
        self,
        gathered: Gathered,
        step: int,
        lr: float,
        factor: Tensor | None,
        visits_done: int,
        durable: bool,
        norms: list[Tensor],
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
            self.stream.update(Update(index, given, the_step, visits_done, durable, norms, done))

    # --------------------------------------------------------------------------------------------------------
    # Passes

    def _weights(self, unit: int) -> dict[str, Tensor]:
        """The unit's parameters in the compute dtype, from the weights that are on the device now."""
        layout, pieces = self.units[unit], self.stream.load(unit)
        if self._copy is not None:
            copies = layout.split(self._copy)
            for copy, weights in zip(copies, pieces, strict=True):
                copy.copy_(weights)
            pieces = copies
        return layout.views(pieces)

    def _let_go(self, unit: int) -> None:
        unbind(self.model, self.units[unit])
        self.stream.release(unit)

    def _layers(self, unit: int) -> list[nn.Module]:
        return [self.model.layers[index] for index in self._ranges[unit]]

    @torch.no_grad()
    def _enter(self, index: int, seed: int, batch: Batch) -> Part:
        torch.manual_seed(seed)
        h, cond, kept = self.objective.enter(batch)
        self.borders.put((0, index), h)
        self.states.save(0, index)
        return Part(seed, batch, cond, kept)

    @torch.no_grad()
    def _forward(self, unit: int, parts: list[Part]) -> None:
        bind(self.model, self._weights(unit), None)
        self.stream.prefetch(unit + 1)
        for index, part in enumerate(parts):
            self.states.restore(unit, index)
            h = self.borders.get((unit, index))
            out = self.objective.through(self._layers(unit), h, part.cond, part.kept)
            self.borders.put((unit + 1, index), out)
            self.states.save(unit + 1, index)
            self.stream.advance()
        self._let_go(unit)

    def _backward(
        self, unit: int, following: int | None, gathered: Gathered | None, parts: list[Part]
    ) -> None:
        """Adds the unit's gradients to what is gathered; None: it has none. `following`: the unit that is
        needed next.
        """
        weights = self._weights(unit)
        if following is not None:
            self.stream.prefetch(following)
        self._bind(unit, weights, gathered)
        count, last = len(self.units), unit == len(self.units) - 1
        for index, part in enumerate(parts):
            self.states.restore(unit, index)
            h = self.borders.get((unit, index)).detach().requires_grad_()
            cond = part.cond.detach().requires_grad_()
            out = self.objective.through(self._layers(unit), h, cond, part.kept)
            self.stream.advance()
            self.monitor.sample()  # activations are at their most
            if last:
                loss = self.objective.leave(out, cond, part.kept, part.batch).mean() / len(parts)
                part.loss = loss.detach()
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
            else:
                backward_from((out, self.borders.get((count, index))), (cond, part.cond_grad))
            del out
            assert h.grad is not None
            self.borders.put((count, index), h.grad)
            part.cond_grad = cond.grad
        self._let_go(unit)

    def _bind(self, unit: int, weights: dict[str, Tensor], gathered: Gathered | None) -> None:
        if gathered is None:
            bind(self.model, weights, None)
            return
        layout: HasSlots = self.layouts[gathered.block] if self._by_block else self.units[unit]
        grads = parameter_views(layout, gathered.flat)
        bind(self.model, weights, {name: grads[name] for name in weights})
        for name in weights:
            parameter = self.model.get_parameter(name)
            # Updates of other units go on while this one computes.
            parameter.register_post_accumulate_grad_hook(lambda _: self.stream.advance())  # type: ignore[no-untyped-call]

    def _backward_of_input(self, parts: list[Part]) -> None:
        if self._lowest:  # nothing that is trained is in the input part
            return
        for index, part in enumerate(parts):
            torch.manual_seed(part.seed)
            h, cond, _ = self.objective.enter(part.batch)
            backward_from((h, self.borders.get((len(self.units), index))), (cond, part.cond_grad))


class RandomStates:
    """The generators' states at the entry of every unit, for every micro-batch.

    They have memory of their own for the whole run. A tensor for each state would lie amid freed activations,
    and the C library's heap would grow around it.
    """

    def __init__(self, num_units: int, parts: int, device: Device) -> None:
        self._device, own = device, device.random_state()
        self._cpu = torch.empty(num_units, parts, RANDOM_STATE_BYTES, dtype=torch.uint8)
        self._own = None if own is None else torch.empty(num_units, parts, len(own), dtype=torch.uint8)

    def save(self, unit: int, part: int) -> None:
        self._cpu[unit, part] = torch.get_rng_state()
        own = self._device.random_state()
        if self._own is not None and own is not None:
            self._own[unit, part] = own

    def restore(self, unit: int, part: int) -> None:
        torch.set_rng_state(self._cpu[unit, part].clone())  # it reads a storage from its start
        if self._own is not None:
            self._device.set_random_state(self._own[unit, part].clone())
