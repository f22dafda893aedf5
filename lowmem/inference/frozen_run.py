"""A trained run opened for reading, one frozen block on the device at a time, and the sampler that walks down
its blocks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from lowmem.blocks.arena import Arena, ArenaLayout, aligned_buffer, bind, parameter_views, unbind
from lowmem.blocks.run_dir import RunDir
from lowmem.errors import ResumeError
from lowmem.machine.detect import training_device
from lowmem.models.base import Batch, BuildModel
from lowmem.noise import block_of, boundaries, sampler_grid
from lowmem.objectives.base import Entered
from lowmem.planning.plan import Plan
from lowmem.planning.settings import COMPUTE_DTYPE, layouts_of
from lowmem.training.open_run import open_stream

TOGETHER = 8  # batches that wait at one border
Item = TypeVar("Item")


class FrozenRun:
    """The weights of a run's last commit, or their average where one is kept (`optimizer.ema`), for reading.

    Close it, or use it in a `with`.
    """

    def __init__(self, run: RunDir, plan: Plan, build_model: BuildModel, resident: bool = False) -> None:
        state = run.read_state()
        if state is None:
            raise ResumeError(f"run folder {run.path}: nothing is committed in it yet; train first")
        run.check_files(state)
        self.plan = plan
        self.device = training_device(plan.profile)
        self.dtype = COMPUTE_DTYPE[plan.settings.precision]
        with torch.device("meta"):
            self.model = build_model()
        self.model.eval()
        self.slices = self.model.block_slices(plan.settings.num_blocks)
        self.layouts, shared_layout = layouts_of(self.model, plan.settings)
        self.stream = open_stream(run, plan, self.model, state.files, resident)
        buffer = aligned_buffer(shared_layout.total_bytes)
        self.stream.block_store.read("shared", buffer)
        self._bind(shared_layout, buffer.to(self.device))

    def __enter__(self) -> FrozenRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def walk(self, blocks: Sequence[int]) -> Iterator[tuple[int, Iterable[nn.Module]]]:
        """Each block in turn with its layers, weights in place; the next is fetched meanwhile."""
        for position, block in enumerate(blocks):
            with self.on_device([block]) as layers:
                if position + 1 < len(blocks):
                    self.stream.prefetch(blocks[position + 1])
                yield block, layers

    def whole(
        self,
        items: Sequence[Item],
        enter: Callable[[Item], Entered],
        leave: Callable[[Item, Tensor, Entered], Tensor],
    ) -> Tensor:
        """What `leave` makes of each item's h after all layers of a model trained end to end, joined along
        the first dimension.

        Where blocks stream, several items pass a block before the next one is fetched.
        """
        out: list[Tensor] = []
        size = 1 if self.stream.resident else TOGETHER
        for start in range(0, len(items), size):
            group = items[start : start + size]
            entered = [enter(item) for item in group]
            passed = [each.h for each in entered]
            for _, layers in self.walk(range(self.plan.settings.num_blocks)):
                through = self.model.objective.through
                passed = [
                    through(self.model, layers, h, each.cond, each.kept, False)
                    for h, each in zip(passed, entered, strict=True)
                ]
            out += [leave(*each) for each in zip(group, passed, entered, strict=True)]
        return torch.cat(out)

    def losses(self, batches: Sequence[Batch]) -> Tensor:
        """Per sample, over all batches, of a model trained end to end."""
        model, objective, noise = self.model, self.model.objective, self.plan.noise
        return self.whole(
            batches,
            lambda batch: objective.enter(model, batch, noise),
            lambda batch, h, entered: objective.leave(model, h, entered.cond, entered.kept, batch, noise),
        )

    @contextlib.contextmanager
    def on_device(self, blocks: Sequence[int]) -> Iterator[Iterable[nn.Module]]:
        """The layers of several blocks: all on the device at once, or where they stream, coming anew each
        time they are gone through.
        """
        if len(blocks) > 1 and not self.stream.resident:
            yield _Passing(self, blocks)
            return
        buffers = {block: self.stream.load(block) for block in blocks}
        for block, buffer in buffers.items():
            self._bind(self.layouts[block], buffer)
        yield [self.model.layers[i] for block in blocks for i in self.slices[block]]
        for block, buffer in buffers.items():
            unbind(self.model, self.layouts[block])
            self.stream.release(block, buffer)

    def schedule(self, num_steps: int) -> list[tuple[int, list[tuple[float, float | None]]]]:
        """The chain, block by block:

        [(block, [(sigma, next sigma or None at the end), ...]), ...], from sigma_max down.
        """
        noise, num_blocks = self.plan.noise, self.plan.settings.num_blocks
        grid, borders = sampler_grid(num_steps, noise), boundaries(num_blocks, noise)
        calls: list[tuple[int, list[tuple[float, float | None]]]] = []
        for sigma, following in zip(grid, [*grid[1:], None], strict=True):
            block = block_of(sigma, borders)
            if not calls or calls[-1][0] != block:
                calls.append((block, []))
            calls[-1][1].append((sigma, following))
        return calls

    def _bind(self, layout: ArenaLayout, buffer: Tensor) -> None:
        bind(self.model, parameter_views(layout, Arena(layout, buffer).result.to(self.dtype)), None)


class _Passing:
    """Layers that come block by block whenever they are gone through."""

    def __init__(self, frozen: FrozenRun, blocks: Sequence[int]) -> None:
        self._frozen, self._blocks = frozen, blocks

    def __iter__(self) -> Iterator[nn.Module]:
        for _, layers in self._frozen.walk(self._blocks):
            yield from layers


def initial_noise(shape: Sequence[int], sigma_max: float) -> Tensor:
    """z at sigma_max: N(0, 1 + sigma_max^2), on the CPU from the default generator."""
    return torch.randn(*shape) * math.sqrt(1 + sigma_max**2)
