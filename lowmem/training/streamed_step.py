"""Exact back-propagation with one block on the device at a time.

    forward     input part | block 0 | block 1 | ...     keeps what crosses the borders between blocks
    backward    last block and the loss | ... | block 1 | block 0 | input part again

All micro-batches of a step pass a block before the next block is fetched, so a step moves the same bytes
whatever its batch. In the backward pass a block's forward is made again from its border. Its gradients,
summed over the micro-batches, are used at once for its update; no other gradients are alive. Block 0 ends a
step and begins the next, so it stays on the device.

The bits are those of plain autograd through the whole model:
  * Every block is entered with the generator's state of the forward pass, so dropout and all draws repeat.
  * All layers use `cond`, and autograd adds its gradients up in the order of the backward pass. Here `cond`
    is a root of each block's backward pass beside the block's output, and the sum so far is its gradient.
    So the sum goes on in the same order.
  * Parameters of the shared part that both the input and the output part use (a tied table) get the same sum.
    Over several micro-batches the output parts' gradients come first here, and alternate with the others in
    plain autograd. The two differ by rounding in that case alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.blocks.arena import unbind
from lowmem.blocks.borders import RANDOM_STATE_BYTES, Borders
from lowmem.blocks.optim import whole_factor
from lowmem.blocks.order import fetches
from lowmem.objectives.base import Batch, Kept, Objective
from lowmem.training.attempt import Attempt
from lowmem.training.finite import FiniteWatch
from lowmem.training.trainable import Trainable


@dataclass
class Part:
    """A micro-batch on its way through the model."""

    seed: int  # of its draws
    batch: Batch
    cond: Tensor
    kept: Kept
    cond_grad: Tensor | None = None  # as far as the backward pass has come
    loss: Tensor | None = None


class StreamedStep:
    """Optimizer steps of a whole model whose blocks come and go."""

    def __init__(
        self, attempt: Attempt, objective: Objective[Any, Any], borders: Borders, watch: FiniteWatch
    ) -> None:
        """`objective`: bound to the attempt's model. `borders`: where the attempt keeps activations."""
        self.watch = watch
        self.model, self.objective, self.borders = attempt.model, objective, borders
        self.stream, self.scratch, self.shared = attempt.stream, attempt.scratch, attempt.shared
        self.monitor, plan = attempt.monitor, attempt.plan
        self.slices, self.recompute = (
            self.model.block_slices(plan.settings.num_blocks),
            plan.settings.recompute,
        )
        self.num_blocks, self.recipe = plan.settings.num_blocks, plan.recipe
        self.fetches = fetches(self.num_blocks, plan.recipe.optimizer.clips_whole)
        self.states = RandomStates(self.num_blocks, borders.parts, self.stream.device)
        self._stays: Tensor | None = None  # block 0, from the end of a step to the forward pass of the next

    def step(
        self,
        micro: Sequence[tuple[int, Batch]],
        step: int,
        lr: float,
        visits_done: int,
        durable: bool,
        more: bool,
    ) -> Tensor:
        """One step over micro-batches, each with its seed. Returns the mean loss, on the device.

        `durable`: the step ends a visit, and its files are to be committed under `visits_done`. `more`:
        another step follows.
        """
        optimizer, factor = self.recipe.optimizer, None
        self.borders.begin()
        self.shared.begin(step + 1, lr, optimizer)
        parts = [self._enter(index, seed, batch) for index, (seed, batch) in enumerate(micro)]
        blocks = self._fetched(more)
        for block, buffer in islice(blocks, self.num_blocks - 1):
            self._forward(block, buffer, parts)

        if optimizer.clips_whole:
            norms = {}
            for block, buffer in islice(blocks, self.num_blocks):
                norms[block] = self._backward(block, buffer, parts).gradient_norm()
                self._let_go(block, buffer)
            self._backward_of_input(parts)
            in_order = [norms[block] for block in range(self.num_blocks)]
            every = [*in_order, self.shared.gradient_norm()]
            self.watch.look(step, *every)
            factor = whole_factor(every, optimizer)
            self.shared.forget()

        for block, buffer in blocks:
            trainable = self._backward(block, buffer, parts)
            trainable.begin(step + 1, lr, optimizer)
            self.watch.look(step, trainable.update(factor))
            if durable:
                self.watch.look(step, trainable.weights_norm())
            unbind(self.model, trainable.arena.layout)
            self.stream.write_back(block, buffer, visits_done, durable, keep=block == 0)
        self._backward_of_input(parts)
        self.watch.look(step, self.shared.update(factor), self.shared.weights_norm())
        total = torch.zeros((), device=self.stream.device)
        for part in parts:
            assert part.loss is not None
            total += part.loss
        self.watch.look(step, total)
        return total

    # --------------------------------------------------------------------------------------------------------
    # Blocks

    def _fetched(self, more: bool) -> Iterator[tuple[int, Tensor]]:
        """The step's blocks on the device, in the order of `fetches`; the next one is fetched meanwhile."""
        for index, (block, weights_only) in enumerate(self.fetches):
            if index == 0 and self._stays is not None:
                buffer, self._stays = self._stays, None
            else:
                buffer = self.stream.load(block, weights_only)
            last = index == len(self.fetches) - 1
            if last:
                self._stays = buffer
            following = self.fetches[1:2] if last else self.fetches[index + 1 : index + 2]
            if following and (more or not last):
                self.stream.prefetch(*following[0])
            yield block, buffer

    def _let_go(self, block: int, buffer: Tensor) -> None:
        unbind(self.model, self.stream.layouts[block])
        self.stream.release(block, buffer)

    def _layers(self, block: int) -> list[nn.Module]:
        return [self.model.layers[i] for i in self.slices[block]]

    # --------------------------------------------------------------------------------------------------------
    # Passes

    @torch.no_grad()
    def _enter(self, index: int, seed: int, batch: Batch) -> Part:
        torch.manual_seed(seed)
        h, cond, kept = self.objective.enter(batch)
        self.borders.put((0, index), h)
        self.states.save(0, index)
        return Part(seed, batch, cond, kept)

    @torch.no_grad()
    def _forward(self, block: int, buffer: Tensor, parts: list[Part]) -> None:
        self.scratch.trainable(0, self.stream.layouts[block], buffer).bind(self.model, frozen=True)
        for index, part in enumerate(parts):
            self.states.restore(block, index)
            h = self.borders.get((block, index))
            out = self.objective.through(self._layers(block), h, part.cond, part.kept)
            self.borders.put((block + 1, index), out)
            self.states.save(block + 1, index)
        self._let_go(block, buffer)

    def _backward(self, block: int, buffer: Tensor, parts: list[Part]) -> Trainable:
        """The block's gradients, and those of all that lies before it."""
        trainable = self.scratch.trainable(0, self.stream.layouts[block], buffer)
        trainable.bind(self.model)
        last = block == self.num_blocks - 1
        for index, part in enumerate(parts):
            self.states.restore(block, index)
            h = self.borders.get((block, index)).detach().requires_grad_()
            cond = part.cond.detach().requires_grad_()
            roots = [self.objective.through(self._layers(block), h, cond, part.kept, self.recompute)]
            grads: list[Tensor | None] = [None]
            if last:
                losses = self.objective.leave(roots[0], cond, part.kept, part.batch)
                roots = [losses.mean() / len(parts)]
                part.loss = roots[0].detach()
            else:
                grads = [self.borders.get((self.num_blocks, index))]
                if part.cond_grad is not None:
                    roots, grads = [*roots, cond], [*grads, part.cond_grad]
            self.monitor.sample()  # activations are at their most
            torch.autograd.backward(roots, grads)
            assert h.grad is not None
            self.borders.put((self.num_blocks, index), h.grad)
            part.cond_grad = cond.grad
        return trainable

    def _backward_of_input(self, parts: list[Part]) -> None:
        for index, part in enumerate(parts):
            torch.manual_seed(part.seed)
            h, cond, _ = self.objective.enter(part.batch)
            pairs = [(h, self.borders.get((self.num_blocks, index))), (cond, part.cond_grad)]
            roots = [(root, grad) for root, grad in pairs if root.requires_grad and grad is not None]
            if roots:
                torch.autograd.backward([root for root, _ in roots], [grad for _, grad in roots])


class RandomStates:
    """The generators' states at the entry of every block, for every micro-batch.

    They have memory of their own for the whole run. A tensor for each state would lie amid freed activations,
    and the C library's heap would grow around it.
    """

    def __init__(self, num_blocks: int, parts: int, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._host = torch.empty(num_blocks, parts, RANDOM_STATE_BYTES, dtype=torch.uint8)
        self._cuda = (
            torch.empty(num_blocks, parts, len(torch.cuda.get_rng_state(device)), dtype=torch.uint8)
            if self._device
            else None
        )

    def save(self, block: int, part: int) -> None:
        self._host[block, part] = torch.get_rng_state()
        if self._cuda is not None and self._device is not None:
            self._cuda[block, part] = torch.cuda.get_rng_state(self._device)

    def restore(self, block: int, part: int) -> None:
        torch.set_rng_state(self._host[block, part].clone())  # it reads a storage from its start
        if self._cuda is not None and self._device is not None:
            torch.cuda.set_rng_state(self._cuda[block, part].clone(), self._device)
