"""Sweeps: K steps of back-propagation for which every block comes to the device only twice.

    forward     K batches pass block 0, then block 1, ...; what crosses the borders is kept
    backward    the last block makes K steps, one for each batch, then the block before it, ... block 0
    input part  makes its K steps

A block computes its step k from the input that is kept of batch k, and from the output gradient that the
block after it has left. Both are stale: they were made with weights of up to K - 1 steps before, of other
blocks. With K = 1 nothing is stale, and a sweep is the exact step.

The shared part has no border of its own. Parameters that only the output part uses make step k with the last
block, all others with the input part. A parameter that both use (a tied table) gathers its gradients of all K
batches and makes its K steps at the end, from their mean. Each of the three is clipped by a norm of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lowmem.blocks.arena import unbind
from lowmem.blocks.borders import Borders
from lowmem.objectives.base import Batch, Objective
from lowmem.training.attempt import Attempt
from lowmem.training.border_passes import BorderPasses, Part, total_loss
from lowmem.training.finite import FiniteWatch
from lowmem.training.shared_use import shared_use


class Sweep:
    """Optimizer steps of a whole model, several at once, whose blocks come and go."""

    def __init__(
        self, attempt: Attempt, objective: Objective[Any, Any], borders: Borders, watch: FiniteWatch
    ) -> None:
        """`objective`: bound to the attempt's model. `borders`: where the attempt keeps activations."""
        assert attempt.sweeps is not None
        self.watch, self.borders, self.model, self.shared = watch, borders, attempt.model, attempt.shared
        self.recipe, self.layouts, self.stream = attempt.plan.recipe, attempt.layouts, attempt.sweeps
        self.steps_at_once = self.recipe.blocks.sweep_steps
        self._device, self._scratch = attempt.device, attempt.scratch
        self._learning_rate = attempt.learning_rate
        blocks = self.model.block_slices(len(self.layouts))
        self.passes = BorderPasses(attempt, objective, borders, blocks)
        self._by_input, self._by_output = shared_use(attempt, objective)

    def train(
        self, micro: Sequence[Sequence[tuple[int, Batch]]], step: int, visits_done: int, durable: bool
    ) -> list[Tensor]:
        """Steps from `step` on, each over its micro-batches with their seeds. Returns each step's mean loss,
        on the device.

        `durable`: the sweep ends a visit, and its files are to be committed under `visits_done`.
        """
        self.passes.begin()
        places = iter(range(self.borders.parts))
        steps = [[self.passes.enter(next(places), *each) for each in parts] for parts in micro]
        last = len(self.layouts) - 1
        for block in range(last):
            self._forward(block, steps)
        for block in range(last, -1, -1):
            self._train_block(block, steps, step, visits_done, durable)
        self._train_input(steps, step)
        self.watch.look(step, self.shared.weights_norm())
        losses = [total_loss(parts, self._device.torch) for parts in steps]
        for index, loss in enumerate(losses):
            self.watch.look(step + index, loss)
        return losses

    # --------------------------------------------------------------------------------------------------------
    # Blocks

    def _forward(self, block: int, steps: list[list[Part]]) -> None:
        layout, last = self.layouts[block], len(self.layouts) - 1
        buffer = self.stream.load(block, whole=False)
        self.stream.prefetch(block + 1, whole=block + 1 == last)
        self._scratch.trainable(0, layout, buffer).bind_to_read(self.model)
        for part in itertools.chain(*steps):
            self.passes.forward(block, part)
        unbind(self.model, layout)
        self.stream.release(block)

    def _train_block(
        self, block: int, steps: list[list[Part]], first: int, visits_done: int, durable: bool
    ) -> None:
        """The block's steps, and those of what only the output part uses."""
        layout, is_last = self.layouts[block], block == len(self.layouts) - 1
        trainable = self._scratch.trainable(0, layout, self.stream.load(block, whole=True))
        if block:
            self.stream.prefetch(block - 1, whole=True)
        trainable.bind(self.model)
        for step, parts in enumerate(steps, first):
            trainable.begin(step + 1, self._learning_rate(step), self.recipe.optimizer)
            for part in parts:
                self.passes.backward(block, part, len(parts), lambda: None)
            self.watch.look(step, trainable.update())
            if is_last:
                self._train_output(step)
        if durable:
            self.watch.look(first + len(steps) - 1, trainable.weights_norm())
        unbind(self.model, layout)
        self.stream.keep(block, visits_done, durable)

    # --------------------------------------------------------------------------------------------------------
    # The shared part

    def _begin(self, step: int) -> None:
        self.shared.begin(step + 1, self._learning_rate(step), self.recipe.optimizer)

    def _train_output(self, step: int) -> None:
        self._begin(step)
        self.watch.look(step, self.shared.update_some(self._by_output - self._by_input))

    def _train_input(self, steps: list[list[Part]], first: int) -> None:
        tied, names = self._by_output & self._by_input, {slot.name for slot in self.shared.arena.layout.slots}
        for step, parts in enumerate(steps, first):
            for part in parts:
                self.passes.backward_of_input(part)
            self._begin(step)
            self.watch.look(step, self.shared.update_some(names - self._by_output))
        self.shared.scale(tied, 1 / len(steps))
        for step in range(first, first + len(steps)):
            self._begin(step)
            self.watch.look(step, self.shared.update_some(tied, keep=step < first + len(steps) - 1))
