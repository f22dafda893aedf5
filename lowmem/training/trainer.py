"""The main job, top to bottom: freeze the plan, make or reopen the run folder, visit block after block,
commit each visit.

Every draw is a function of (seed, block, step, micro-batch), so nothing random is saved and a resumed run
draws what an unbroken one would have drawn. To resume: call again with the same plan and folder.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowmem.blocks.arena import aligned_buffer, unbind
from lowmem.blocks.borders import Borders
from lowmem.blocks.optim import whole_factor
from lowmem.blocks.order import Visit
from lowmem.blocks.run_dir import BlockRecord, FileRecord, RunDir, RunState
from lowmem.blocks.stream import BlockStream
from lowmem.errors import ResumeError, StoreError, TrainingError
from lowmem.machine.detect import training_device
from lowmem.machine.environment import read_environment
from lowmem.machine.heap import give_back_freed
from lowmem.machine.monitor import Monitor, sample_fields
from lowmem.models.base import Batch, BuildModel, check_model
from lowmem.planning.plan import Plan, first_difference, read_plan
from lowmem.planning.settings import COMPUTE_DTYPE, layouts_of
from lowmem.reporting.telemetry import Listener, Recorder
from lowmem.schedule import learning_rate, mix_seed
from lowmem.training.first_weights import create_weights
from lowmem.training.memory_guard import (
    check_available,
    go_on_smaller,
    is_out_of_memory,
    require_available,
    smaller,
)
from lowmem.training.open_run import open_borders, open_stream
from lowmem.training.streamed_step import StreamedStep
from lowmem.training.trainable import SHARED, Scratch

COLLAPSE_COSINE = (
    0.5  # mean pairwise cosine of the target table above which the targets no longer tell classes apart
)
Number = TypeVar("Number", int, float)
Batches = Callable[
    [int], Mapping[str, Any]
]  # step -> arrays or tensors by name, first dimension = train.batch_size


@dataclass
class Clock:
    """Seconds of the run so far, over all processes that took part."""

    total_s: float = 0.0
    compute_s: float = 0.0
    exposed_transfer_s: float = 0.0
    commit_s: float = 0.0
    started: float = field(default_factory=time.perf_counter, repr=False)

    def as_dict(self) -> dict[str, float]:
        total = self.total_s + time.perf_counter() - self.started
        return {
            "total_s": total,
            "compute_s": self.compute_s,
            "exposed_transfer_s": self.exposed_transfer_s,
            "commit_s": self.commit_s,
        }


def added(earlier: Mapping[str, Number], now: Mapping[str, Number]) -> dict[str, Number]:
    return {name: earlier.get(name, 0) + figure for name, figure in now.items()}


class Trainer:
    """Trains `build_model()` by `plan` in `run_dir`. Raises BudgetError at once if the plan does not fit.

    `listeners` are called with each telemetry record (a dict) as it is written: the live view is one.
    """

    def __init__(
        self,
        build_model: BuildModel,
        plan: Plan,
        run_dir: str | os.PathLike[str],
        listeners: Sequence[Listener] = (),
    ) -> None:
        plan.require_fit()
        self.plan, self.recipe, self.run, self.listeners = plan, plan.recipe, RunDir(run_dir), list(listeners)
        self.frozen, self.queue = plan, plan.queue()
        self.device = training_device(plan.profile)
        if self.recipe.train.deterministic and self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        with torch.device("meta"):
            self.model = build_model()
        check_model(self.model)
        self.slices = self.model.block_slices(plan.settings.num_blocks)
        self.layouts, self.shared_layout = layouts_of(self.model, plan.settings)
        self.streamed: StreamedStep | None = None  # where a model trained end to end does not fit
        self.borders = Borders(0, 0, False)
        self.visit: Visit | None = None  # under way

    def fit(self, batches: Batches) -> RunState:
        """Trains what is still to train and returns the committed state. `batches(step)`: the batch of that
        step of every block.

        Raises ResumeError if the folder belongs to another plan or process, StoreError if a file is torn or
        cannot be written, BudgetError if the machine cannot give now what the plan takes, ShortageError where
        its memory runs short on the way.
        """
        while True:
            try:
                return self._fit(batches)
            except (RuntimeError, MemoryError) as problem:
                if not is_out_of_memory(problem):
                    raise
                half = go_on_smaller(self.run, self.plan, self.visit, self.monitor.run_peak, self.listeners)
            # here, not before: the error held the frames in which it was raised, and their tensors
            self._let_go()
            self._use(smaller(self.plan, half))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _fit(self, batches: Batches) -> RunState:
        self.monitor = Monitor(self.plan.profile.unified)
        self.run.acquire()
        if self.plan.profile.unified:
            give_back_freed()  # the plan counts on it
        recorder = stream = borders = None
        try:
            # the run folder: a new one, or what is committed
            state = self._open()
            if state.micro_batch_size is not None:
                self._use(smaller(self.plan, state.micro_batch_size))
            recorder = Recorder(self.run.telemetry_path)
            recorder.listeners += self.listeners
            with self.monitor:
                self.recorder, self.clock = recorder, Clock(**state.time)
                if state.visits_done == self.queue.num_visits:
                    return state
                recorder.write(
                    "open",
                    visits_done=state.visits_done,
                    visits_total=self.queue.num_visits,
                    pid=os.getpid(),
                    environment=read_environment(),
                )

                # the shared part stays on the device; blocks come and go, unless they all fit
                self.stream = stream = open_stream(self.run, self.plan, self.model, state.files)
                self._hold_shared(stream)
                recorder.write("staging", **stream.facts())
                self.model.train()
                if self.recipe.method == "end_to_end" and not stream.resident:
                    self.borders = borders = open_borders(self.plan, self.device, self.run.path)
                    self.streamed = StreamedStep(
                        self.model, self.plan, stream, self.scratch, self.shared, borders, self.monitor
                    )

                # visit after visit
                for visit, upcoming in self.queue.pending(state.visits_done):
                    state = self._visit(visit, upcoming, state, batches)
                    if upcoming is not None:
                        check_available(self.plan, self.monitor.last, committed=True)
                stream.finish()
                recorder.write("trained", visits_done=state.visits_done)
                return self.run.read_state() or state
        finally:
            for part in (borders, stream):
                if part is not None:
                    part.close()
            if recorder is not None:
                recorder.close()
            self.run.release()

    # --------------------------------------------------------------------------------------------------------
    # A visit

    def _visit(self, visit: Visit, upcoming: Visit | None, state: RunState, batches: Batches) -> RunState:
        """Trains the visit's blocks, hands them to the writer.

        Returns the state as it will be once committed.
        """
        self.visit = visit
        self.recorder.write(
            "visit",
            visit=visit.index,
            blocks=list(visit.blocks),
            first_step=visit.first_step,
            num_steps=visit.num_steps,
        )
        train = self._streamed_steps if self.streamed else self._resident_steps
        start, exposed_before = time.perf_counter(), self._exposed_s()
        losses, buffers = train(visit, upcoming, batches)
        mean_loss = float(
            torch.stack(losses).mean()
        )  # on CUDA the first look at a loss: waits for the visit's last kernel
        exposed_s = self._exposed_s() - exposed_before
        self.clock.exposed_transfer_s += exposed_s
        self.clock.compute_s += time.perf_counter() - start - exposed_s
        if not math.isfinite(mean_loss):
            raise TrainingError(
                f"visit {visit.index}, block {', '.join(map(str, visit.blocks))}: loss {mean_loss} in steps {visit.first_step} to "
                f"{visit.first_step + visit.num_steps - 1}; allowed: a finite number; the last commit is kept: lower train.lr "
                f"(now {self.recipe.train.lr}) in another --run-dir"
            )

        health = self.model.objective.health(self.model)
        state = self._next_state(state, visit, mean_loss, health)
        start = time.perf_counter()
        wait = self.plan.settings.write_back == "wait"
        self.stream.store(buffers, self.shared.arena.buffer, visit.index + 1, self._committer(state), wait)
        self.clock.commit_s += time.perf_counter() - start
        return state

    def _resident_steps(
        self, visit: Visit, upcoming: Visit | None, batches: Batches
    ) -> tuple[list[Tensor], dict[int, Tensor]]:
        """The visit's steps with all of its blocks on the device.

        Returns the losses, and the blocks to store.
        """
        stream, optimizer = self.stream, self.recipe.optimizer
        buffers = {block: stream.load(block) for block in visit.blocks}
        if upcoming is not None and not set(upcoming.blocks) & set(visit.blocks):
            stream.prefetch(upcoming.blocks[0])
        trainables = [
            self.scratch.trainable(place, self.layouts[block], buffers[block])
            for place, block in enumerate(visit.blocks)
        ]
        for trainable in trainables:
            trainable.bind(self.model)
        losses = []
        shared_step = self.queue.steps_done(visit.index)
        for step in range(visit.first_step, visit.first_step + visit.num_steps):
            start = time.perf_counter()
            lr = learning_rate(step, self.recipe.train)
            shared_step += 1
            for trainable in trainables:
                trainable.begin(step + 1, lr, optimizer)
            self.shared.begin(shared_step, lr, optimizer)
            loss = self._forward_backward(visit, step, batches(step))
            every = (*trainables, self.shared)
            factor = (
                whole_factor([trainable.gradient_norm() for trainable in every], optimizer)
                if optimizer.clips_whole
                else None
            )
            for trainable in every:
                trainable.update(factor)
            losses.append(loss)
            self._record_step(visit, step, lr, loss, time.perf_counter() - start)
        for block in visit.blocks:
            unbind(self.model, self.layouts[block])
        return losses, buffers

    def _streamed_steps(
        self, visit: Visit, upcoming: Visit | None, batches: Batches
    ) -> tuple[list[Tensor], dict[int, Tensor]]:
        """The visit's steps of the whole model with one block on the device at a time; the last step has
        written what is to be committed.
        """
        assert self.streamed is not None
        losses = []
        stop = visit.first_step + visit.num_steps
        for step in range(visit.first_step, stop):
            start = time.perf_counter()
            ends_visit, lr = step == stop - 1, learning_rate(step, self.recipe.train)
            micro = list(self._micro_batches(visit, step, batches(step)))
            more = not ends_visit or upcoming is not None
            loss = self.streamed.step(micro, step, lr, visit.index + 1, ends_visit, more)
            losses.append(loss)
            self._record_step(visit, step, lr, loss, time.perf_counter() - start)
        return losses, {}

    def _forward_backward(self, visit: Visit, step: int, arrays: Mapping[str, Any]) -> Tensor:
        """Gradients of the step's mean loss, over micro-batches; returns that loss, on the device."""
        plan, objective = self.plan, self.model.objective
        parts = self.recipe.train.batch_size // plan.settings.micro_batch_size
        total = torch.zeros((), device=self.device)
        layers = [self.model.layers[i] for block in visit.blocks for i in self.slices[block]]
        for seed, micro in self._micro_batches(visit, step, arrays):
            torch.manual_seed(seed)  # noise and dropout
            if self.recipe.method == "end_to_end":
                losses = objective.end_to_end_loss(
                    self.model, layers, micro, plan.noise, plan.settings.recompute
                )
            else:
                interval = objective.interval(
                    visit.blocks[0], plan.settings.num_blocks, plan.noise, self.recipe.blocks.overlap_gamma
                )
                losses = objective.block_loss(
                    self.model, layers, micro, interval, plan.noise, plan.settings.recompute
                )
            loss = losses.mean() / parts
            self.monitor.sample()  # activations are at their most
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _micro_batches(
        self, visit: Visit, step: int, arrays: Mapping[str, Any]
    ) -> Iterator[tuple[int, Batch]]:
        """The step's micro-batches on the device, each with the seed of its draws."""
        size = self.plan.settings.micro_batch_size
        batch = {name: torch.as_tensor(value) for name, value in arrays.items()}
        for part in range(self.recipe.train.batch_size // size):
            rows = slice(part * size, (part + 1) * size)
            seed = mix_seed(self.recipe.train.seed, "step", visit.blocks[0], step, part)
            yield (
                seed,
                {name: value[rows].to(self.device, non_blocking=True) for name, value in batch.items()},
            )

    def _record_step(self, visit: Visit, step: int, lr: float, loss: Tensor, step_s: float) -> None:
        fields: dict[str, Any] = {
            "visit": visit.index,
            "block": visit.blocks[0] if len(visit.blocks) == 1 else None,
            "step": step,
        }
        if not loss.is_cuda:  # reading it there would make the host wait for the device in every step
            fields["loss"] = round(float(loss), 6)
        self.recorder.write(
            "step", **fields, lr=lr, step_s=round(step_s, 6), **sample_fields(self.monitor.last)
        )
        check_available(self.plan, self.monitor.last, committed=False)

    # --------------------------------------------------------------------------------------------------------
    # State

    def _next_state(self, state: RunState, visit: Visit, loss: float, health: dict[str, float]) -> RunState:
        peak = self.monitor.take_peak()
        blocks = list(state.blocks)
        for block in visit.blocks:
            old = blocks[block]
            blocks[block] = BlockRecord(
                block=block,
                visits=old.visits + 1,
                steps=visit.first_step + visit.num_steps,
                loss=loss,
                measured_peak_bytes=max(old.measured_peak_bytes, peak.device_bytes),
            )
        run_peak = self.monitor.run_peak
        measured = {
            "device_peak_bytes": max(state.measured.get("device_peak_bytes", 0), run_peak.device_bytes),
            "host_peak_bytes": max(state.measured.get("host_peak_bytes", 0), run_peak.host_bytes),
        }
        figures = {"loss": loss, "device_peak_bytes": peak.device_bytes, **health, **self.clock.as_dict()}
        self.recorder.write("visited", visit=visit.index, blocks=list(visit.blocks), **figures)
        if health.get("table_cosine", 0.0) > COLLAPSE_COSINE:
            message = f"the target table is collapsing: mean cosine of its rows {health['table_cosine']:.2f}, alarm above {COLLAPSE_COSINE}; lower train.lr"
            self.recorder.write("warning", visit=visit.index, message=message)
        return state.model_copy(
            update={
                "visits_done": visit.index + 1,
                "blocks": blocks,
                "time": self.clock.as_dict(),
                "measured": measured,
            }
        )

    def _committer(self, state: RunState) -> Callable[[dict[str, FileRecord]], None]:
        """What the writer calls when a visit's files are on the disk.

        `files` grows from commit to commit, in the writer's order.
        """

        def commit(files: dict[str, FileRecord]) -> None:
            self._files.update(files)
            disk_bytes = sum(record.num_bytes for record in self._files.values()) + sum(
                record.num_bytes for record in files.values()
            )
            measured = {**state.measured, "disk_bytes": disk_bytes}
            moved: dict[str, Any] = {
                "traffic": added(self._earlier.traffic, added(self.borders.traffic(), self.stream.traffic())),
                "transfer_s": added(self._earlier.transfer_s, self.stream.transfer_s()),
            }
            self.run.commit(
                state.model_copy(update={"files": dict(self._files), "measured": measured, **moved})
            )
            self.recorder.write(
                "commit",
                visits_done=state.visits_done,
                disk_bytes=disk_bytes,
                **moved["traffic"],
                **moved["transfer_s"],
            )

        return commit

    def _let_go(self) -> None:
        """Of all that a failed attempt had on the device: the next one begins from the files."""
        for layout in (*self.layouts, self.shared_layout):
            unbind(self.model, layout)
        for name in ("stream", "scratch", "shared"):
            vars(self).pop(name, None)

    def _use(self, plan: Plan) -> None:
        self.plan, self.streamed, self.borders = plan, None, Borders(0, 0, False)

    # --------------------------------------------------------------------------------------------------------
    # Opening

    def _open(self) -> RunState:
        frozen = {
            key: value
            for key, value in self.frozen.to_dict().items()
            if key in ("schema", "recipe", "profile", "settings")
        }
        if self.run.exists():
            old = read_plan(self.run).to_dict()
            difference = first_difference({key: old.get(key) for key in frozen}, frozen)
            if difference:
                key, was, now = difference
                raise ResumeError(
                    f"run folder {self.run.path}: made with {key} = {was}, now {now}; use the same value, or another --run-dir"
                )
        state = self.run.read_state()
        if state is None or state.visits_done < self.queue.num_visits:
            require_available(self.plan)
        if not self.run.exists():
            self.run.write_plan(self.frozen.to_dict())
        if state is None:
            self.run.remove_leftovers(None)
            files = create_weights(self.run, self.plan, self.model)
            state = RunState(
                files=files, blocks=[BlockRecord(block=block) for block in range(len(self.layouts))]
            )
            self.run.commit(state)
        self.run.check_files(state)
        if state.visits_done > self.queue.num_visits:
            raise StoreError(
                f"{self.run.state_path}: {state.visits_done} visits done of {self.queue.num_visits}; restore it from a copy"
            )
        self.run.remove_leftovers(state)
        self._files = dict(state.files)
        self._earlier = state  # what earlier processes moved
        return state

    def _exposed_s(self) -> float:
        return self.stream.exposed_s + self.borders.exposed_s

    def _hold_shared(self, stream: BlockStream) -> None:
        buffer = aligned_buffer(self.shared_layout.total_bytes)
        stream.block_store.read("shared", buffer)
        settings = self.plan.settings
        dtype, seed = COMPUTE_DTYPE[settings.precision], self.recipe.train.seed
        together = self.recipe.method == "end_to_end" and stream.resident
        self.scratch = Scratch(
            self.layouts, self.shared_layout, dtype, self.device, seed, settings.during_backward, together
        )
        self.shared = self.scratch.trainable(SHARED, self.shared_layout, buffer.to(self.device))
        self.shared.bind(self.model)
