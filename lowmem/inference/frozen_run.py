"""A trained run opened for reading: one frozen block on the device at a time, and the schedule of a chain of
blocks.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowmem.blocks.arena import Arena, ArenaLayout, bind, computing, parameter_views, unbind
from lowmem.blocks.run_dir import RunDir, RunState
from lowmem.blocks.unit_stream import UnitStream
from lowmem.data.text import TextConfig
from lowmem.data.tokenizer import NO_FILES
from lowmem.errors import ConfigError, DataError, ResumeError
from lowmem.files import printable
from lowmem.inference.progress import Say, silent
from lowmem.machine.detect import training_device
from lowmem.machine.heap import give_back_freed
from lowmem.models import model_builder
from lowmem.models.base import BlockModel, BuildModel, num_weights
from lowmem.noise import block_of, boundaries, sampler_grid
from lowmem.objectives.base import Batch, Entered, Objective
from lowmem.planning.evaluation import Evaluation
from lowmem.planning.footprint import without_headroom
from lowmem.planning.plan import Plan, evaluation_of, read_plan
from lowmem.planning.run_data import require_sources, spec_of
from lowmem.planning.settings import COMPUTE_DTYPE, layouts_of, units_of
from lowmem.recipe import CustomModel
from lowmem.training.open_run import bind_base, open_stream
from lowmem.units import shown

Item = TypeVar("Item")
ModelT = TypeVar("ModelT", bound=BlockModel)
ObjectiveT = TypeVar("ObjectiveT", bound=Objective[Any, Any])


def open_run(
    run_dir: str | os.PathLike[str], for_drawing: bool = False, build_model: BuildModel | None = None
) -> FrozenRun:
    """A run's last commit, opened from its folder alone: neither its data nor the network are used.

    `for_drawing`: a causal model needs every block for every token, so blocks that were trained alone stay on
    the device if the budget holds them all. Other models stream for every token. `build_model`: of a model of
    the user's own, which its folder does not tell. Raises ResumeError if the folder holds no run, StoreError
    if a file is damaged, DataError if it names data of this machine and no fingerprint of them, ConfigError
    if `build_model` is missing, or builds another model than the one that was trained.
    """
    run = RunDir(run_dir)
    plan = read_plan(run)
    _require_fingerprint(plan, run)
    require_sources(plan)
    if isinstance(plan.recipe.model, CustomModel) == (build_model is None):
        found, what = ("none", "give one") if build_model is None else ("one", "leave it out")
        raise ConfigError(
            f"run folder {run.path}: build_model: found {found}, with model.name '{plan.recipe.model.name}'; "
            f"allowed: one for 'custom', which the folder does not tell, and none for others; {what}"
        )
    return FrozenRun(run, plan, build_model or model_builder(plan.recipe, spec_of(plan)), for_drawing)


def _require_fingerprint(plan: Plan, run: RunDir) -> None:
    """A stranger's plan may name any file of this machine. Without a fingerprint none is read."""
    data = plan.recipe.data
    path = getattr(data, "path", None)
    if isinstance(data, TextConfig) and data.tokenizer_name not in NO_FILES:
        path = path or data.tokenizer_name
    if plan.data is None and path is not None:
        raise DataError(
            f"{printable(run.plan_path)}: names '{shown(path, 100)}' and no fingerprint of the data; "
            "allowed: both; if the run is yours, its train command, given again, records it"
        )


def _require_same(model: BlockModel, plan: Plan) -> None:
    """Raises ConfigError where `build_model` builds a model of another size than the one that was trained."""
    found = num_weights(model, model.named_parameters())
    if found != plan.num_parameters:
        raise ConfigError(
            f"build_model: found a model of {found} parameters; allowed: {plan.num_parameters}, as the "
            "run's; give the function that the run was trained with"
        )


class FrozenRun:
    """The weights of a run's last commit, or their average where one is kept (`optimizer.ema`), for reading.

    Close it, or use it in a `with`. Raises ResumeError if nothing is committed, StoreError if a file is
    damaged.
    """

    def __init__(self, run: RunDir, plan: Plan, build_model: BuildModel, for_drawing: bool = False) -> None:
        """`for_drawing`: blocks that every draw needs stay on the device, if the budget holds them."""
        self.say: Say = silent  # is told how far a long evaluation is
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as opened:  # closes what is open if a later step fails
            opened.callback(run.let_go)
            state = run.hold_committed()
            if state is None:
                raise ResumeError(f"run folder {run.path}: nothing is committed in it yet; train first")
            grow_visits = plan.queue().grow_visits
            if state.visits_done < grow_visits:
                raise ResumeError(
                    f"run folder {run.path}: {state.visits_done} visits are made; allowed: {grow_visits} or "
                    "more, because the model grows then (blocks.grow_at) and all blocks but one are "
                    "untrained; go on with lowmem train"
                )
            run.check_files(state)
            self._open(run, plan, build_model, state, for_drawing)
            opened.callback(self.stream.close)
            if self.units is not None:
                opened.callback(self.units.close)
            shared = computing(self.stream.load_shared_result(), self.dtype)
            bind(self.model, parameter_views(self.shared_layout, shared), None)
            bind_base(self.stream, self.model, plan)
            self._closing = opened.pop_all()

    def _open(
        self, run: RunDir, plan: Plan, build_model: BuildModel, state: RunState, for_drawing: bool
    ) -> None:
        self.plan, self._build_model, self._sizes = plan, build_model, plan.predicted.evaluation
        device = training_device(plan.profile)
        self.device = device.torch
        self.dtype = COMPUTE_DTYPE[plan.settings.precision]
        with torch.device("meta"):
            self.model = build_model()
        _require_same(self.model, plan)
        self.model.eval()
        self.objective = self.model.make_objective(plan.noise)
        self.slices = self.model.block_slices(plan.settings.num_blocks)
        self.layouts, self.shared_layout = layouts_of(self.model, plan.settings)
        if self.device.type == "cpu":
            give_back_freed()  # the plan counts on it
        independent = not plan.recipe.whole
        together = for_drawing and independent and self.objective.draws_with_all_blocks
        resident = together and self._all_blocks_fit()
        self.stream = open_stream(run, plan, self.model, state.files, resident)
        self.units: UnitStream | None = None  # of a model that was trained end to end and does not fit whole
        if not (independent or self.stream.resident):
            units = units_of(self.model, plan.settings, self.layouts, device.kind, frozen=True)
            prefetch, store = plan.recipe.offload.prefetch, self.stream.block_store
            self.units = UnitStream(store, units, device, frozenset(), prefetch, updates=False)

    @property
    def room_bytes(self) -> int:
        """Bytes that the plan's budget leaves for activations."""
        return without_headroom(self.plan.budget.device_bytes) - self.sized().base_bytes

    def _all_blocks_fit(self) -> bool:
        """Whether the budget holds all blocks, and one call, where a draw is quicker with all of them."""
        sizes, copies = self.sized(), COMPUTE_DTYPE[self.plan.settings.precision].itemsize
        blocks = sum(layout.total_bytes + copies * layout.numel for layout in self.layouts)
        held = sizes.by_category["weights"] + sizes.by_category["optimizer_state"]
        return self.room_bytes + held - blocks >= sizes.by_category["activations"]

    def __enter__(self) -> FrozenRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def parts(self, model: type[ModelT], objective: type[ObjectiveT]) -> tuple[ModelT, ObjectiveT]:
        """The model and its objective, as the kinds that the caller knows them to be."""
        assert isinstance(self.model, model) and isinstance(self.objective, objective)
        return self.model, self.objective

    def size_for(self, num_test: int) -> Evaluation:
        """How an evaluation on so many test samples is cut to stay in the budget."""
        sizes = self.sized()
        config = self.plan.recipe.eval
        if sizes.num_samples != min(num_test, (config.num_batches or num_test) * config.batch_size):
            self._sizes = evaluation_of(self.plan, self._build_model, num_test)
        return self.sized()

    def sized(self) -> Evaluation:
        """How an evaluation is cut: as it was planned, or as `size_for` has found since."""
        if self._sizes is None:  # a plan from before evaluations were planned
            self._sizes = evaluation_of(self.plan, self._build_model, None)
        assert self._sizes is not None, "what can be opened has an evaluation"
        return self._sizes

    @property
    def blocks(self) -> range:
        return range(self.plan.settings.num_blocks)

    def walk(self, blocks: Sequence[int]) -> Iterator[tuple[int, Iterable[nn.Module]]]:
        """Each block in turn with its layers, weights in place; the next block is fetched meanwhile."""
        for position, block in enumerate(blocks):
            with self.on_device([block]) as layers:
                if position + 1 < len(blocks):
                    self.stream.prefetch(blocks[position + 1])
                yield block, layers

    def passed(self) -> Iterator[Iterable[nn.Module]]:
        """All layers in order, as many at a time as are on the device."""
        if self.units is None:
            yield from (layers for _, layers in self.walk(self.blocks))
            return
        for index, run in enumerate(self.model.units()):
            unit = self.units.units[index]
            weights = [computing(piece, self.dtype) for piece in self.units.load(index)]
            bind(self.model, unit.views(weights), None)
            if index + 1 < len(self.units.units):
                self.units.prefetch(index + 1)
            yield [self.model.layers[layer] for layer in run]
            unbind(self.model, unit)
            self.units.release(index)

    def walk_owners(self, blocks: Sequence[int]) -> Iterator[tuple[int, Iterable[nn.Module]]]:
        """Each block with the layers that serve its levels: its own, or all of them in a model trained end to
        end.
        """
        if self.plan.recipe.whole:
            with self.on_device(self.blocks) as layers:
                yield from ((block, layers) for block in blocks)
        else:
            yield from self.walk(blocks)

    def whole(
        self,
        items: Sequence[Item],
        enter: Callable[[Item], Entered],
        leave: Callable[[Item, Tensor, Entered], Tensor],
    ) -> Tensor:
        """`leave` of each item's h after all layers of a model trained end to end, joined along the first
        dimension.

        Where blocks stream, several items pass a block before the next one is fetched. An item is a
        micro-batch.
        """
        out: list[Tensor] = []
        sizes = self.sized()
        size = 1 if self.stream.resident else max(sizes.walk_size // sizes.micro_batch_size, 1)
        for start, stop in spans(len(items), size):
            group = items[start:stop]
            entered = [enter(item) for item in group]
            passed = [each.h for each in entered]
            entered = [each._replace(h=each.h.new_empty(0)) for each in entered]
            for layers in self.passed():
                for i, each in enumerate(entered):
                    passed[i] = self.objective.through(layers, passed[i], each.cond, each.kept)
            out += [leave(*each) for each in zip(group, passed, entered, strict=True)]
        return torch.cat(out)

    def losses(self, batches: Sequence[Batch]) -> Tensor:
        """Loss per sample, over all batches, of a model trained end to end; computed micro-batch by
        micro-batch.
        """
        objective, size = self.objective, self.sized().micro_batch_size
        parts = [
            {name: value[start:stop] for name, value in batch.items()}
            for batch in batches
            for start, stop in spans(len(next(iter(batch.values()))), size)
        ]
        return self.whole(
            parts,
            objective.enter,
            lambda batch, h, entered: objective.leave(h, entered.cond, entered.kept, batch),
        )

    def each_alone(self) -> list[Iterable[nn.Module]]:
        """The layers of each block, within `on_device` of all blocks."""
        if self.stream.resident:
            return [[self.model.layers[i] for i in part] for part in self.slices]
        return [_Passing(self, [block]) for block in self.blocks]

    @contextlib.contextmanager
    def on_device(self, blocks: Sequence[int]) -> Iterator[Iterable[nn.Module]]:
        """The layers of several blocks, all on the device at once.

        Where they stream, the layers come anew each time that the iterable is gone through.
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
        """The chain, block by block, from sigma_max down.

        [(block, [(sigma, next sigma or None at the end), ...]), ...]
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
        weights = computing(Arena(layout, buffer).result, self.dtype)
        bind(self.model, parameter_views(layout, weights), None)


class _Passing:
    """Layers that come as they pass the device, whenever they are gone through."""

    def __init__(self, frozen: FrozenRun, blocks: Sequence[int]) -> None:
        self._frozen, self._blocks = frozen, blocks

    def __iter__(self) -> Iterator[nn.Module]:
        frozen = self._frozen
        every = frozen.units is not None and len(self._blocks) == len(frozen.blocks)
        for layers in frozen.passed() if every else (part for _, part in frozen.walk(self._blocks)):
            yield from layers


def spans(count: int, size: int) -> list[tuple[int, int]]:
    """`count` things in order, `size` at a time: (first, end) of each part."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def initial_noise(shape: Sequence[int], sigma_max: float) -> Tensor:
    """z at sigma_max: N(0, 1 + sigma_max^2), on the CPU from the default generator."""
    return torch.randn(*shape) * math.sqrt(1 + sigma_max**2)
