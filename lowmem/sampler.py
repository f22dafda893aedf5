"""A trained run opened for reading, one frozen block on the device at a time, and the sampler that walks down its blocks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lowmem.arena import Arena, ArenaLayout, aligned_buffer, bind, parameter_views, unbind
from lowmem.errors import ResumeError
from lowmem.footprint import COMPUTE_DTYPE, layouts_of, training_device
from lowmem.models.base import BuildModel, block_slices
from lowmem.noise import block_of, boundaries, sampler_grid
from lowmem.plan import Plan
from lowmem.run_dir import RunDir
from lowmem.weights import open_stream


class FrozenRun:
    """The weights of a run's last commit, or their average where one is kept (`optimizer.ema`), for reading. Close it, or use it in a `with`."""

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
        self.slices = block_slices(len(self.model.layers), plan.settings.num_blocks)
        self.layouts, shared_layout = layouts_of(self.model, plan.settings)
        self.stream = open_stream(run, plan, self.model, state.files, resident)
        buffer = aligned_buffer(shared_layout.total_bytes)
        self.stream.block_store.read("shared", buffer)
        self._bind(shared_layout, buffer.to(self.device))

    def __enter__(self) -> FrozenRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def walk(self, blocks: Sequence[int]) -> Iterator[tuple[int, list[nn.Module]]]:
        """Each block in turn with its layers, weights in place; the next is fetched meanwhile."""
        for position, block in enumerate(blocks):
            with self.on_device([block]) as layers:
                if position + 1 < len(blocks):
                    self.stream.prefetch(blocks[position + 1])
                yield block, layers

    @contextlib.contextmanager
    def on_device(self, blocks: Sequence[int]) -> Iterator[list[nn.Module]]:
        """The layers of several blocks at once (all of them, for a model trained end to end)."""
        buffers = {block: self.stream.load(block) for block in blocks}
        for block, buffer in buffers.items():
            self._bind(self.layouts[block], buffer)
        yield [self.model.layers[i] for block in blocks for i in self.slices[block]]
        for block, buffer in buffers.items():
            unbind(self.model, self.layouts[block])
            self.stream.release(block, buffer)

    def schedule(self, num_steps: int) -> list[tuple[int, list[tuple[float, float | None]]]]:
        """The chain, block by block: [(block, [(sigma, next sigma or None at the end), ...]), ...], from sigma_max down."""
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
        arena = Arena(layout, buffer)
        bind(self.model, parameter_views(layout, arena.state.get("ema", arena.weights).to(self.dtype)), None)


def initial_noise(shape: Sequence[int], sigma_max: float) -> Tensor:
    """z at sigma_max: N(0, 1 + sigma_max^2), on the CPU from the default generator."""
    return torch.randn(*shape) * math.sqrt(1 + sigma_max**2)
