"""The main job, top to bottom: open the run folder, visit block after block, commit each visit.

Every draw is a function of (seed, block, step, micro-batch), so nothing random is saved, and a resumed run
draws what an unbroken one would have drawn. To resume: call again with the same plan and folder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lowmem.blocks.arena import Arena, bind, computing, parameter_views, unbind
from lowmem.blocks.optim import whole_factor
from lowmem.blocks.order import Visit
from lowmem.blocks.run_dir import BlockRecord, RunDir, RunState
from lowmem.machine.detect import training_device
from lowmem.machine.device import is_out_of_memory
from lowmem.models.base import BuildModel, check_model
from lowmem.objectives.base import Batch
from lowmem.planning.plan import Plan
from lowmem.planning.settings import layouts_of
from lowmem.reporting.telemetry import Listener
from lowmem.schedule import mix_seed
from lowmem.training.attempt import Attempt
from lowmem.training.coordinate import Coordinate
from lowmem.training.finite import FiniteWatch, not_finite
from lowmem.training.given_batches import Batches, batches_of, checked_batch
from lowmem.training.memory_guard import check_available, go_on_smaller
from lowmem.training.ranks import ALONE, Ranks
from lowmem.training.roots import scaled
from lowmem.training.rounds import Rounds
from lowmem.training.streamed_step import StreamedStep
from lowmem.training.sweep import Sweep
from lowmem.training.trainable import Trainable

Trained = tuple[list[Tensor], dict[int, Tensor]]  # the losses of a visit's steps, and the blocks to store


class Trainer:
    """Trains `build_model()` by `plan` in `run_dir`. Raises BudgetError at once if the plan does not fit.

    `listeners` are called with each telemetry record (a dict) as it is written: the live view is one.
    `notices` are records (event, fields) that training begins with. `ranks`: what trains beside this process.
    """

    def __init__(
        self,
        build_model: BuildModel,
        plan: Plan,
        run_dir: str | os.PathLike[str],
        listeners: Sequence[Listener] = (),
        notices: Sequence[tuple[str, dict[str, Any]]] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        plan.require_fit()
        self.ranks = ranks
        self.plan, self.recipe, self.run, self.listeners = plan, plan.recipe, RunDir(run_dir), list(listeners)
        self.notices = list(notices)
        self.queue, self.device = plan.queue(), training_device(plan.profile)
        with torch.device("meta"):
            self.model = build_model()
        check_model(self.model)
        self.objective = self.model.make_objective(plan.noise)
        self.slices = self.model.block_slices(plan.settings.num_blocks)
        self.layouts, self.shared_layout = layouts_of(self.model, plan.settings)
        self.example = self.model.example_batch(1)

    def fit(self, batches: Batches | DataLoader[Any]) -> RunState:
        """Trains what is still to train and returns the committed state.

        `batches(step)` gives the batch of that step of every block. A DataLoader is read epoch after epoch;
        see `LoaderBatches`. Raises DataError for a batch that is not like the model's example, or a
        DataLoader whose order cannot be drawn again, ResumeError if the folder belongs to another plan or
        process, StoreError if a file is torn or cannot be written, BudgetError if the machine cannot give now
        what the plan takes, ShortageError where its memory runs short on the way.
        """
        batches = batches_of(batches, self.recipe.train)
        while True:
            attempt = Attempt(self.run, self.plan, self.model, self.listeners, self.ranks)
            try:
                train = self.recipe.train
                kernels = self.device.kernels(train.deterministic, train.fp16_accumulation)
                with kernels, attempt:
                    state = self._train(attempt, batches)
                if state.visits_done == self.queue.num_visits:
                    return state
            except (RuntimeError, MemoryError) as problem:
                if not is_out_of_memory(problem) or self.ranks.size > 1:  # the others would wait for ever
                    raise
                peak = attempt.monitor.run_peak
                go_on_smaller(self.run, attempt.plan, attempt.visit, peak, self.listeners)
            # here, not before: the error held the frames in which it was raised, and their tensors
            del attempt
            self.device.give_back()

    def begin(self) -> None:
        """Commits the first weights, where nothing is committed yet. Raises as `fit`."""
        with Attempt(self.run, self.plan, self.model, self.listeners):
            pass

    def _train(self, attempt: Attempt, batches: Batches) -> RunState:
        if attempt.finished:
            return attempt.state
        while self.notices:  # once, also where memory makes a second attempt
            event, fields = self.notices.pop(0)
            attempt.recorder.write(event, **fields)
        watch, borders = FiniteWatch(self.device.torch), attempt.borders
        streamed: StreamedStep | Sweep | Coordinate | None = None
        if self.recipe.method == "block_coordinate":
            streamed = Coordinate(attempt, self.objective)
        elif borders is not None:
            kind = StreamedStep if attempt.sweeps is None else Sweep
            streamed = kind(attempt, self.objective, borders, watch)
        if self.queue.together:
            self._train_rounds(attempt, watch, batches)
        for visit, upcoming in self.queue.pending(attempt.state.visits_done):
            if visit.index == self.queue.grow_visits and not attempt.grown:
                break  # the whole model lies on the device in another way
            mean_loss, buffers = self._make_visit(attempt, watch, streamed, visit, upcoming, batches)
            self._store(attempt, visit, mean_loss, buffers)
            if upcoming is not None:
                check_available(attempt.plan, attempt.monitor.last, committed=True)
        attempt.stream.finish()
        if attempt.state.visits_done == self.queue.num_visits:
            attempt.recorder.write("trained", visits_done=attempt.state.visits_done)
        return (self.run.read_state() if self.ranks.leads else None) or attempt.state

    def _train_rounds(self, attempt: Attempt, watch: FiniteWatch, batches: Batches) -> None:
        def make_visit(visit: Visit, upcoming: Visit | None) -> tuple[BlockRecord, Tensor]:
            block = visit.blocks[0]
            loss, buffers = self._make_visit(attempt, watch, None, visit, upcoming, batches)
            return attempt.visited(visit, loss, self.objective.health())[block], buffers[block]

        Rounds(attempt, make_visit).train()

    def _make_visit(
        self,
        attempt: Attempt,
        watch: FiniteWatch,
        streamed: StreamedStep | Sweep | Coordinate | None,
        visit: Visit,
        upcoming: Visit | None,
        batches: Batches,
    ) -> tuple[float, dict[int, Tensor]]:
        """Returns the mean loss and the blocks to store. All numbers are finite."""
        attempt.visit = visit
        attempt.recorder.write(
            "visit",
            visit=visit.index,
            blocks=list(visit.blocks),
            first_step=visit.first_step,
            num_steps=visit.num_steps,
        )
        start, exposed_before = time.perf_counter(), attempt.exposed_s
        if isinstance(streamed, StreamedStep | Sweep):
            losses, buffers = self._streamed_steps(attempt, streamed, visit, batches)
        else:
            losses, buffers = self._resident_steps(attempt, watch, visit, upcoming, batches, streamed)
        mean_loss = float(torch.stack(losses).mean())  # on CUDA it waits for the visit's last kernel
        attempt.record_late()
        self._require_finite(attempt, watch, visit, batches)
        exposed_s = attempt.exposed_s - exposed_before
        attempt.clock.exposed_transfer_s += exposed_s
        attempt.clock.compute_s += time.perf_counter() - start - exposed_s
        return mean_loss, buffers

    def _store(self, attempt: Attempt, visit: Visit, mean_loss: float, buffers: dict[int, Tensor]) -> None:
        """Hands the visit's blocks to the writer. `attempt.state` is then what will be committed."""
        attempt.state = attempt.next_state(visit, mean_loss, self.objective.health())
        attempt.empty_pool()
        start, grows = time.perf_counter(), visit.index + 1 == self.queue.grow_visits
        last = visit.index + 1 == self.queue.num_visits  # nothing will run beside its commit
        attempt.stream.store(
            buffers,
            attempt.shared_buffer,
            visit.index + 1,
            attempt.committer(attempt.state),
            wait=last or attempt.plan.settings.write_back == "wait",
            written=attempt.take_written(),
            copies={block: 0 for block in range(1, len(self.layouts))} if grows else None,
        )
        attempt.clock.commit_s += time.perf_counter() - start

    def _require_finite(self, attempt: Attempt, watch: FiniteWatch, visit: Visit, batches: Batches) -> None:
        """Raises TrainingError if a number of the visit so far is not finite; records it for `status`."""
        step = watch.first_step()
        if step is None:
            return
        settings, levels = attempt.plan.settings, None
        if not self.recipe.whole:
            gamma = self.recipe.blocks.overlap_gamma
            levels = self.objective.interval(visit.blocks[0], settings.num_blocks, gamma)
        problem = not_finite(self.recipe, visit, step, levels, batches(self.queue.draw_of(visit, step)))
        attempt.recorder.write("failed", visit=visit.index, step=step, message=str(problem))
        raise problem

    # --------------------------------------------------------------------------------------------------------
    # A visit's steps

    def _resident_steps(
        self,
        attempt: Attempt,
        watch: FiniteWatch,
        visit: Visit,
        upcoming: Visit | None,
        batches: Batches,
        coordinate: Coordinate | None,
    ) -> Trained:
        """The visit's steps with all of its blocks on the device. `coordinate`: of the whole model."""
        stream, optimizer = attempt.stream, self.recipe.optimizer
        buffers = {block: stream.load(block) for block in visit.blocks}
        if upcoming is not None and not set(upcoming.blocks) & set(visit.blocks):
            stream.prefetch(upcoming.blocks[0])
        trainables = self._bound(attempt, visit, buffers)
        if coordinate is not None:
            coordinate.begin_visit(visit)
        shared = attempt.shared if coordinate is None else coordinate
        every, losses = [*trainables, shared], []
        shared_step = self.queue.shared_steps(visit)
        for step in range(visit.first_step, visit.first_step + visit.num_steps):
            start, lr = time.perf_counter(), attempt.learning_rate(step)
            shared_step += 1
            for trainable in trainables:
                trainable.begin(step + 1, lr, optimizer)
            shared.begin(shared_step, lr, optimizer)
            draw = self.queue.draw_of(visit, step)
            micro = self._micro_batches(attempt.plan, visit, draw, batches(draw))
            if coordinate is not None and coordinate.streams:
                loss = coordinate.forward_backward(step, list(micro))
            else:
                loss = self._forward_backward(attempt, visit, micro)
            factor = None
            if optimizer.clips_whole:
                norms = [trainable.gradient_norm() for trainable in (*trainables, attempt.shared)]
                watch.look(step, *norms)
                factor = whole_factor(norms, optimizer)
            watch.look(step, loss, *(trainable.update(factor) for trainable in every))
            if watch.at_once:
                self._require_finite(attempt, watch, visit, batches)
            losses.append(loss)
            attempt.record_step(visit, step, lr, loss, time.perf_counter() - start)
        watch.look(step, *(trainable.weights_norm() for trainable in every))
        for block in visit.blocks:
            unbind(self.model, self.layouts[block])
        if coordinate is not None:
            coordinate.end_visit()
        return losses, buffers if trainables else {}

    def _bound(self, attempt: Attempt, visit: Visit, buffers: dict[int, Tensor]) -> list[Trainable]:
        """Binds the visit's blocks, and returns those that are trained."""
        scratch, trainables = attempt.scratch, list[Trainable]()
        for block in visit.blocks:
            layout = self.layouts[block]
            if attempt.plan.settings.frozen is None:
                place = block if scratch.together else 0
                trainables.append(scratch.trainable(place, layout, buffers[block]))
                trainables[-1].bind(self.model)
            else:
                weights = computing(Arena(layout, buffers[block]).weights, scratch.dtype)
                bind(self.model, parameter_views(layout, weights), None)
        return trainables

    def _streamed_steps(
        self, attempt: Attempt, streamed: StreamedStep | Sweep, visit: Visit, batches: Batches
    ) -> Trained:
        """The visit's steps of the whole model, with one unit or block on the device at a time.

        The last step has already written what is to be committed, so there are no blocks to store.
        """
        losses, stop, size = list[Tensor](), visit.first_step + visit.num_steps, streamed.steps_at_once
        for first in range(visit.first_step, stop, size):
            start, steps = time.perf_counter(), range(first, min(first + size, stop))
            micro = [list(self._micro_batches(attempt.plan, visit, step, batches(step))) for step in steps]
            some = streamed.train(micro, first, visit.index + 1, steps.stop == stop)
            if streamed.watch.at_once:
                self._require_finite(attempt, streamed.watch, visit, batches)
            losses += some
            step_s = (time.perf_counter() - start) / len(steps)
            for step, loss in zip(steps, some, strict=True):
                attempt.record_step(visit, step, attempt.learning_rate(step), loss, step_s)
        return losses, {}

    def _forward_backward(
        self, attempt: Attempt, visit: Visit, micro_batches: Iterable[tuple[int, Batch]]
    ) -> Tensor:
        """Gradients of the step's mean loss, over micro-batches. Returns that loss, on the device."""
        objective, settings = self.objective, attempt.plan.settings
        parts = self.recipe.train.batch_size // settings.micro_batch_size
        total = torch.zeros((), device=self.device.torch)
        blocks = range(len(self.slices)) if self.recipe.method == "block_coordinate" else visit.blocks
        layers = [self.model.layers[i] for block in blocks for i in self.slices[block]]
        for seed, micro in micro_batches:
            torch.manual_seed(seed)  # noise and dropout
            if self.recipe.whole:
                losses = objective.end_to_end_loss(layers, micro, settings.recompute)
            else:
                gamma = self.recipe.blocks.overlap_gamma
                interval = objective.interval(visit.blocks[0], settings.num_blocks, gamma)
                losses = objective.block_loss(layers, micro, interval, settings.recompute)
            loss = losses.mean() / parts
            attempt.monitor.sample()  # activations are at their most
            scaled(loss, self.recipe.optimizer).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _micro_batches(self, plan: Plan, visit: Visit, step: int, arrays: Any) -> Iterator[tuple[int, Batch]]:
        """The step's micro-batches on the device, each with the seed of its draws."""
        size = plan.settings.micro_batch_size
        batch = checked_batch(arrays, self.example, self.recipe.train.batch_size, step)
        for part in range(self.recipe.train.batch_size // size):
            rows = slice(part * size, (part + 1) * size)
            seed = mix_seed(self.recipe.train.seed, "step", visit.blocks[0], step, part)
            yield (
                seed,
                {name: self.device.bring(value[rows]) for name, value in batch.items()},
            )
