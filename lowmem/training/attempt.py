"""One attempt at a fit: everything that lives from the opened run folder to its closed threads.

An attempt opens the folder (lock, plan, committed state), then the stream of blocks, the shared part and the
files it writes to. `with` closes all of it, however the attempt ends. When memory runs out the trainer makes
another attempt.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lowmem.blocks.arena import ArenaLayout, unbind
from lowmem.blocks.borders import Borders
from lowmem.blocks.order import Visit
from lowmem.blocks.run_dir import BlockRecord, FileRecord, RankRecord, RunDir, RunState
from lowmem.blocks.seal import BACK
from lowmem.blocks.stream import BlockStream
from lowmem.blocks.sweep_stream import SweepStream
from lowmem.blocks.traffic import Traffic, TransferTimes
from lowmem.blocks.unit_stream import UnitStream, spread, spread_over, updates_in_place
from lowmem.blocks.verify import check_contents
from lowmem.errors import StoreError
from lowmem.machine.detect import training_device
from lowmem.machine.device import Later
from lowmem.machine.environment import read_environment
from lowmem.machine.heap import give_back_freed
from lowmem.machine.monitor import Monitor, sample_fields
from lowmem.machine.pool import Pool, activation_pool
from lowmem.models.base import BlockModel
from lowmem.planning.plan import Plan, check_continues, read_plan
from lowmem.planning.settings import COMPUTE_DTYPE, base_layout_of, layouts_of, shared_unit, units_of
from lowmem.reporting.telemetry import Listener, Recorder, read_records
from lowmem.schedule import learning_rate
from lowmem.training.first_weights import check_given, create_weights
from lowmem.training.memory_guard import check_available, require_available, smaller
from lowmem.training.open_run import bind_base, layouts_by_key, open_borders, open_stream
from lowmem.training.ranks import ALONE, Ranks
from lowmem.training.resting import Resting
from lowmem.training.trainable import SHARED, Scratch, Trainable

# GiB per second of a disk whose files are read whole before the first visit: four seconds per GiB
SLOWEST_CHECKED = 0.25
# mean pairwise cosine of the target table above which targets no longer tell classes apart
COLLAPSE_COSINE = 0.5
NO_TRAFFIC, NO_TIMES = Traffic(), TransferTimes()


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


def last_device(telemetry: Path) -> str | None:
    """The device that the run was opened on last, as its telemetry tells."""
    found = None
    for record in read_records(telemetry):
        if record["event"] == "open" and isinstance(record.get("device"), str):
            found = record["device"]
    return found


class Attempt:
    """What training needs while it runs. After `with` has opened it, `state` is what is committed.

    `plan` is the frozen plan, or that plan with the smaller micro-batch that an earlier attempt has come to.
    Where the run is finished already, only the folder is opened: there is no stream.
    """

    recorder: Recorder
    clock: Clock
    state: RunState
    stream: BlockStream
    scratch: Scratch
    shared: Trainable

    def __init__(
        self,
        run: RunDir,
        frozen: Plan,
        model: BlockModel,
        listeners: Sequence[Listener] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        self.run, self.frozen, self.plan, self.model, self.listeners = run, frozen, frozen, model, listeners
        self.ranks, self.device = ranks, training_device(frozen.profile)
        self.layouts, self.shared_layout = layouts_of(model, frozen.settings)
        self.queue = frozen.queue()
        self.monitor = Monitor(frozen.profile.unified, self.device)
        self.base: ArenaLayout | None = None  # frozen weights that are in no block
        # Where a model that is trained end to end streams: one of the two, and borders.
        self.units: UnitStream | None = None
        self.sweeps: SweepStream | None = None
        self.borders: Borders | None = None
        self.resting: Resting | None = None  # in the place of `shared`, where its arena rests with the blocks
        self.grown = True  # all blocks are trained; before, the first is the whole model (`blocks.grow_at`)
        self.pool: Pool | None = None  # lends memory to this thread's operators while the attempt is open
        self.visit: Visit | None = None  # under way
        self._late: deque[tuple[dict[str, Any], Later]] = deque()  # steps and their losses
        self._checked = False  # whether the content of the committed files is known to be right
        self._closing = contextlib.ExitStack()

    @property
    def finished(self) -> bool:
        return self.state.visits_done == self.queue.num_visits

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.plan.recipe.train, self.queue.grow_steps)

    def __enter__(self) -> Attempt:
        with contextlib.ExitStack() as opened:  # closes what is open if a later step fails
            if not self.ranks.leads:
                self.ranks.told()  # rank 0 has opened the run
            self.run.acquire(self.ranks.rank)
            opened.callback(self.run.release)
            if self.plan.profile.unified:
                give_back_freed()  # the plan counts on it
            self.state = self._open_state() if self.ranks.leads else self._opened_state()
            if self.ranks.leads:
                self.ranks.told(True)
            if self.state.micro_batch_size is not None:
                self.plan = smaller(self.plan, self.state.micro_batch_size)
            self.recorder = Recorder(self.run.telemetry_of(self.ranks.rank))
            opened.callback(self.recorder.close)
            self.recorder.listeners += self.listeners
            opened.enter_context(self.monitor)
            self.clock = Clock(**self.state.time)
            if not self.finished:
                self._open_stream(opened)
                self.pool = opened.enter_context(activation_pool(self.plan.predicted.pool_bytes))
            self._closing = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    # --------------------------------------------------------------------------------------------------------
    # Opening

    def _open_state(self) -> RunState:
        """The committed state; of a new run, after its first weights are written."""
        run, keys = self.run, ("schema", "recipe", "profile", "noise", "settings")
        given = {key: value for key, value in self.frozen.to_dict().items() if key in keys}
        if run.exists():
            check_continues(run.path, {key: read_plan(run).to_dict().get(key) for key in given}, given)
        state = run.read_state()
        if state is None or state.visits_done < self.queue.num_visits:
            require_available(self.plan)
        if not run.exists():
            check_given(self.model)
            run.write_plan(self.frozen.to_dict())
        if state is None:
            run.begin()
            files = create_weights(run, self.plan, self.model)
            blocks = [BlockRecord(block=block) for block in range(len(self.layouts))]
            state = RunState(files=files, blocks=blocks)
            run.commit(state)
            self._checked = True
            return state
        self._check(state)
        run.remove_leftovers(state)
        return state

    def _opened_state(self) -> RunState:
        """The committed state of a run that rank 0 has opened, and has looked at."""
        self.run.read_plan()  # takes the run's identity
        state = self.run.read_state()
        assert state is not None
        if state.visits_done < self.queue.num_visits:
            require_available(self.plan)
        self.run.check_files(state)
        return state

    def _check(self, state: RunState) -> None:
        """Looks at everything that the run goes on from, before the first visit. Raises StoreError."""
        base = base_layout_of(self.model, self.frozen.settings)
        run, keys = self.run, set(layouts_by_key(self.layouts, self.shared_layout, base))
        if set(state.files) != keys:
            odd = min(set(state.files) ^ keys)
            raise StoreError(f"{run.state_path}: files: found {odd!r} missing or too much; {BACK}")
        if state.visits_done > self.queue.num_visits:
            raise StoreError(
                f"{run.state_path}: {state.visits_done} visits done of {self.queue.num_visits}; "
                "restore it from a copy"
            )
        run.check_files(state)
        rate = self.frozen.profile.disk.read_gib_per_s
        if state.visits_done < self.queue.num_visits and (rate is None or rate >= SLOWEST_CHECKED):
            check_contents(run, state)
            self._checked = True

    def _open_stream(self, opened: contextlib.ExitStack) -> None:
        """The shared part stays on the device. Blocks come and go, unless they all fit."""
        plan, state = self.plan, self.state
        now, last = self.device.name(), last_device(self.run.telemetry_path)
        self.recorder.write(
            "open",
            visits_done=state.visits_done,
            visits_total=self.queue.num_visits,
            pid=os.getpid(),
            rank=self.ranks.rank,
            num_ranks=self.ranks.size,
            device=now,
            environment=read_environment(),
        )
        if last not in (None, now):
            message = (
                f"this run was on {last} and goes on on {now}: cards draw other random numbers, so it will "
                "not end with the unbroken run's digest"
            )
            self.recorder.write("warning", message=message)
        self.grown = state.visits_done >= self.queue.grow_visits
        resident = not self.grown  # one block alone does not move
        self.stream = open_stream(self.run, plan, self.model, state.files, resident, self._checked)
        opened.callback(self.stream.close)
        self.recorder.write("staging", **self.stream.facts())
        whole, swept = plan.recipe.whole and self.grown, plan.recipe.blocks.sweep_steps > 1
        dtype, seed = COMPUTE_DTYPE[plan.settings.precision], plan.recipe.train.seed
        self.scratch = Scratch(
            self.layouts,
            self.shared_layout,
            dtype,
            self.device.torch,
            seed,
            plan.settings.during_backward,
            together=whole and self.stream.resident and not swept,
            in_turns=plan.recipe.method == "block_coordinate",
        )
        opened.callback(self._let_go)
        passing = whole and (swept or not self.stream.resident)
        if passing:
            self._open_passing(opened, swept)
        if passing and self.units is not None and plan.settings.shared == "tier":
            self.resting = Resting(self.shared_layout, self.units, dtype, seed)
            self.resting.bind(self.model)
        else:
            self.shared = self.scratch.trainable(SHARED, self.shared_layout, self.stream.load_shared())
            self.shared.bind(self.model)
        self.base = bind_base(self.stream, self.model, plan)
        self.model.train()
        self._files = dict(state.files)
        before = self.run.read_previous()
        self._files_before = {} if before is None else before.files
        self._earlier = state.traffic, state.transfer_s  # what earlier processes moved

    def _open_passing(self, opened: contextlib.ExitStack, swept: bool) -> None:
        """Opens what takes the whole model through the device: the borders, and units or blocks."""
        plan, store, device = self.plan, self.stream.block_store, self.device
        self.borders = open_borders(plan, self.model, device, self.run.path, store.ring)
        opened.callback(self.borders.close)
        prefetch, resident = plan.recipe.offload.prefetch, plan.settings.resident_layers
        if swept:
            stay = spread(len(self.layouts), len(self.layouts) if self.stream.resident else resident)
            self.sweeps = SweepStream(store, self.layouts, device, stay, prefetch)
            opened.callback(self.sweeps.close)
            return
        units = units_of(self.model, plan.settings, self.layouts, device.kind)
        stay, updates = spread(len(units), resident), plan.settings.frozen is None
        updates = updates and plan.recipe.method == "end_to_end"
        in_place = updates and updates_in_place(units, plan.recipe.optimizer.grad_clip)
        rests, ready = plan.settings.shared == "tier", self.stream.wait_for
        shared = shared_unit(self.shared_layout, plan.settings, device.kind) if rests else None
        held = spread_over(len(units), stay, plan.settings.resident_weights)
        self.units = UnitStream(store, units, device, stay, prefetch, updates, in_place, shared, held, ready)
        opened.callback(self.units.close)

    def take_written(self) -> dict[str, Future[FileRecord]]:
        """The files of blocks that a visit has written already, by key, for the commit that names them."""
        passing = self.units or self.sweeps
        return {} if passing is None else passing.take_written()

    def _let_go(self) -> None:
        """Gives back all that the attempt has on the device: an evaluation, or the next attempt, needs the
        room.
        """
        for layout in (*self.layouts, self.shared_layout, *([] if self.base is None else [self.base])):
            unbind(self.model, layout)
        for held in ("scratch", "shared", "resting"):
            self.__dict__.pop(held, None)

    # --------------------------------------------------------------------------------------------------------
    # A step, a visit, a commit

    @property
    def exposed_s(self) -> float:
        """Seconds that compute stood waiting, for blocks and for activations at borders."""
        moving = (self.stream, self.borders, self.units, self.sweeps)
        return sum(part.exposed_s for part in moving if part is not None)

    @property
    def shared_buffer(self) -> Tensor | None:
        """The shared part's bytes to commit; None where they are written as those of units are."""
        return None if self.resting is not None else self.shared.arena.buffer

    def empty_pool(self) -> None:
        """Before a visit is written: the copies that go to the disk take memory of their own."""
        if self.pool is not None:
            self.pool.keep_at_most(0)

    def record_step(self, visit: Visit, step: int, lr: float, loss: Tensor, step_s: float) -> None:
        """Raises ShortageError where other programs have left too little memory."""
        block = visit.blocks[0] if len(visit.blocks) == 1 else None
        sample = self.monitor.last
        fields = {"visit": visit.index, "block": block, "step": step, "lr": lr, "step_s": round(step_s, 6)}
        self._late.append(({**fields, **sample_fields(sample)}, self.device.later(loss)))
        self.record_late(ready=True)
        check_available(self.plan, sample, committed=False)

    def record_late(self, ready: bool = False) -> None:
        """Writes the records of steps that wait for their loss; `ready`: those whose loss is there by now."""
        while self._late and (not ready or self._late[0][1].ready):
            fields, loss = self._late.popleft()
            self.recorder.write("step", **fields, loss=round(loss.read(), 6))

    def next_state(self, visit: Visit, loss: float, health: dict[str, float]) -> RunState:
        """What will be committed after the visit; its files and traffic are known to `committer` alone."""
        state = self.state
        blocks = self.visited(visit, loss, health)
        done = {"visits_done": visit.index + 1, "blocks": blocks}
        return state.model_copy(
            update={**done, "time": self.clock.as_dict(), "measured": self._peaks_with([])}
        )

    def visited(self, visit: Visit, loss: float, health: dict[str, float]) -> list[BlockRecord]:
        """The figures of all blocks after a visit, which is recorded."""
        peak, blocks = self.monitor.take_peak(), list(self.state.blocks)
        for block in visit.blocks:
            old = blocks[block]
            blocks[block] = BlockRecord(
                block=block,
                visits=old.visits + 1,
                steps=visit.first_step + visit.num_steps,
                loss=loss,
                measured_peak_bytes=max(old.measured_peak_bytes, peak.device_bytes),
            )
        figures = {"loss": loss, "device_peak_bytes": peak.device_bytes, **health, **self.clock.as_dict()}
        self.recorder.write("visited", visit=visit.index, blocks=list(visit.blocks), **figures)
        cosine = health.get("table_cosine", 0.0)
        if cosine > COLLAPSE_COSINE:
            message = (
                f"the target table is collapsing: mean cosine of its rows {cosine:.2f}, alarm above "
                f"{COLLAPSE_COSINE}; lower train.lr"
            )
            self.recorder.write("warning", visit=visit.index, message=message)
        return blocks

    def _peaks_with(self, others: Sequence[RankRecord]) -> dict[str, int]:
        """The highest peaks of the run so far, of any rank."""
        own, before = self.monitor.run_peak, self.state.measured
        return {
            name: max(before.get(name, 0), getattr(own, pool), *(getattr(rank, name) for rank in others))
            for name, pool in (("device_peak_bytes", "device_bytes"), ("host_peak_bytes", "host_bytes"))
        }

    # --------------------------------------------------------------------------------------------------------
    # A round, by one rank or several

    def rank_record(self) -> RankRecord:
        """What this rank has taken and moved in this process."""
        peak, sent = self.monitor.run_peak, Traffic(exchanged_bytes=self.ranks.exchanged_bytes)
        return RankRecord(
            rank=self.ranks.rank,
            device_peak_bytes=peak.device_bytes,
            host_peak_bytes=peak.host_bytes,
            traffic=self.stream.traffic() + sent,
            transfer_s=self.stream.transfer_s(),
        )

    def take_round(self, visits_done: int, visited: Sequence[BlockRecord]) -> None:
        """Makes a round what this rank goes on from. `visited`: the figures of blocks that have changed."""
        new = {record.block: record for record in visited}
        blocks = [new.get(record.block, record) for record in self.state.blocks]
        self.state = self.state.model_copy(update={"visits_done": visits_done, "blocks": blocks})

    def commit_round(
        self,
        visits_done: int,
        visited: Sequence[BlockRecord],
        files: dict[str, FileRecord],
        ranks: Sequence[RankRecord],
    ) -> None:
        """Writes the shared part and commits a round whose blocks are on the disk. On rank 0 alone."""
        began = time.perf_counter()
        self.take_round(visits_done, visited)
        self.state = self.state.model_copy(
            update={
                "ranks": list(ranks) if self.ranks.size > 1 else [],
                "time": self.clock.as_dict(),
                "measured": self._peaks_with(ranks),
            }
        )
        others = [rank for rank in ranks if rank.rank != self.ranks.rank]
        moved = sum((rank.traffic for rank in others), Traffic(exchanged_bytes=self.ranks.exchanged_bytes))
        self.stream.store(
            {},
            self.shared.arena.buffer,
            visits_done,
            self.committer(self.state, moved, sum((rank.transfer_s for rank in others), TransferTimes())),
            wait=True,
            written={key: _done(record) for key, record in files.items()},
        )
        self.clock.commit_s += time.perf_counter() - began

    def committer(
        self, state: RunState, moved_too: Traffic = NO_TRAFFIC, took_too: TransferTimes = NO_TIMES
    ) -> Callable[[dict[str, FileRecord]], None]:
        """What the writer's thread calls when a visit's files are on the disk. `moved_too`, `took_too`:
        beside this process's stream, and its borders.

        `self._files` grows from commit to commit, in the order of the writer.
        """
        earlier_traffic, earlier_times = self._earlier[0] + moved_too, self._earlier[1] + took_too

        def commit(files: dict[str, FileRecord]) -> None:
            before, self._files = self._files, {**self._files, **files}
            kept = (*self._files_before.values(), *before.values(), *self._files.values())
            keep_previous = self.plan.recipe.offload.keep_previous
            disk_bytes = sum({record.name: record.num_bytes for record in kept}.values())
            self._files_before = before if keep_previous else {}
            traffic, times = earlier_traffic + self.stream.traffic(), earlier_times + self.stream.transfer_s()
            if self.borders is not None:
                traffic = traffic + self.borders.traffic()
            measured = {**state.measured, "disk_bytes": disk_bytes}
            moved = {"traffic": traffic, "transfer_s": times, "files": dict(self._files)}
            self.run.commit(state.model_copy(update={"measured": measured, **moved}), keep_previous)
            figures = {**traffic.model_dump(), **times.model_dump()}
            self.recorder.write("commit", visits_done=state.visits_done, disk_bytes=disk_bytes, **figures)

        return commit


def _done(record: FileRecord) -> Future[FileRecord]:
    """A file that is on the disk already."""
    future = Future[FileRecord]()
    future.set_result(record)
    return future
