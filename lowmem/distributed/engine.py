"""Trains a model end to end over ranks by DeepSpeed's engine; the result goes back into the run folder.

Each rank takes its rows of every batch. DeepSpeed spreads optimizer state, gradients and weights (ZeRO) as
the plan says. A commit gathers weights and moments, and rank 0 writes them to the blocks' files. So eval,
sample and export are the same as ever, and the run goes on with fewer ranks, or alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowmem.blocks.arena import Arena, ArenaLayout, aligned_buffer, parameter_views
from lowmem.blocks.order import Visit
from lowmem.blocks.run_dir import RankRecord, RunState
from lowmem.blocks.traffic import Traffic, TransferTimes
from lowmem.distributed.ranks import JoinedRanks
from lowmem.errors import TrainingError
from lowmem.machine.monitor import Monitor
from lowmem.models.base import BuildModel, named_shared_parameters
from lowmem.planning.plan import Plan
from lowmem.recipe import Recipe
from lowmem.schedule import learning_rate, mix_seed
from lowmem.training.attempt import Attempt
from lowmem.training.given_batches import Batches, checked_batch
from lowmem.training.open_run import layouts_by_key
from lowmem.training.ranks import Ranks
from lowmem.training.trainer import Trainer

MOMENTS = ("exp_avg", "exp_avg_sq")


def engine_refusal(recipe: Recipe, plan: Plan, size: int) -> str:
    """Why DeepSpeed's engine does not train this, in one line; nothing where it does."""
    optimizer, train = recipe.optimizer, recipe.train
    found = f"with {size} ranks and method end_to_end"
    if plan.settings.optimizer != "adamw" or optimizer.ema is not None:
        return (
            f"optimizer.name: {found}: found '{plan.settings.optimizer}'; allowed: adamw, without ema; set it"
        )
    if optimizer.grad_clip is not None and not optimizer.clips_whole:
        return f"optimizer.clip: {found}: found 'block'; allowed: global, or grad_clip null; set it"
    if train.batch_size % size:
        return f"ranks: found {size} for train.batch_size {train.batch_size}; allowed: a divisor of it"
    if plan.settings.precision == "float16":
        return f"train.precision: {found}: found float16; allowed: float32, bfloat16; set it"
    if plan.settings.weights != "float32" or recipe.adapter is not None or recipe.model.freezes:
        return f"train.weights: {found}: allowed: float32, and all weights trained; train on one device"
    if recipe.blocks.sweep_steps > 1 or recipe.blocks.grow_at is not None:
        return f"blocks: {found}: allowed: no sweep_steps and no grow_at; leave them out"
    return ""


def engine_config(plan: Plan, size: int, micro_batch_size: int, folder: str) -> dict[str, Any]:
    """DeepSpeed's configuration of a plan: the tier says what is offloaded, and how far state is spread."""
    recipe, tier = plan.recipe, "device" if plan.profile.unified else plan.settings.tier
    stage = recipe.offload.zero_stage
    zero: dict[str, Any] = {"stage": (1 if tier == "device" else 3) if stage == "auto" else stage}
    if tier != "device":
        where = {"device": "cpu"} if tier == "host" else {"device": "nvme", "nvme_path": folder}
        zero["offload_optimizer"] = where
        if zero["stage"] == 3:
            zero["offload_param"] = where
    return {
        "train_batch_size": recipe.train.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": recipe.train.batch_size // (micro_batch_size * size),
        "gradient_clipping": recipe.optimizer.grad_clip or 0.0,
        "bf16": {"enabled": plan.settings.precision == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: nothing is compiled
        "steps_per_print": 10**9,
    }


class _Loss(nn.Module):
    """The model as DeepSpeed calls it: a micro-batch to its mean loss."""

    def __init__(self, model: Any, plan: Plan) -> None:
        super().__init__()
        self.model, self.recompute = model, plan.settings.recompute
        self.objective = model.make_objective(plan.noise)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        losses: Tensor = self.objective.end_to_end_loss(self.model.layers, batch, self.recompute)
        return losses.mean()


class EngineRun:
    """One launch of a run by DeepSpeed's engine. `attempt`: rank 0's hold on the run folder."""

    def __init__(
        self, ranks: JoinedRanks, trainer: Trainer, build_model: BuildModel, attempt: Attempt | None
    ) -> None:
        self.ranks, self.trainer, self.attempt = ranks, trainer, attempt
        self.plan, self.recipe, self.device = trainer.plan, trainer.recipe, trainer.device
        self.visits_done = int(ranks.told(attempt.state.visits_done if attempt else None))
        rows = self.recipe.train.batch_size // ranks.size
        wanted = self.plan.settings.micro_batch_size
        self.micro = max(size for size in range(1, min(rows, wanted) + 1) if rows % size == 0)
        ranks.open_group(self.device.torch)
        self.model = build_model().to(self.device.torch)
        self.layouts = layouts_by_key(trainer.layouts, trainer.shared_layout)
        self.parameters = dict(self.model.named_parameters())
        moments = self._receive()
        self.engine = self._initialized()
        self._take_moments(moments)

    def _initialized(self) -> Any:
        os.environ.setdefault("DS_ACCELERATOR", self.device.kind)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed

        # Nothing is compiled: without this exchange through shared memory, gloo does it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        optimizer, config = self.recipe.optimizer, self._config()
        decayed = [weight for weight in self.parameters.values() if weight.ndim >= 2]
        others = [weight for weight in self.parameters.values() if weight.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": optimizer.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        betas = (optimizer.betas[0], optimizer.betas[1])
        adamw = torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=optimizer.eps)
        loss = _Loss(self.model, self.plan)
        engine = deepspeed.initialize(model=loss, optimizer=adamw, config=config, dist_init_required=False)[0]
        if config["zero_optimization"]["stage"] == 3:
            for _, weight in named_shared_parameters(self.model):  # used outside of their modules' forward
                deepspeed.zero.register_external_parameter(loss, weight)
        return engine

    def _config(self) -> dict[str, Any]:
        return engine_config(self.plan, self.ranks.size, self.micro, str(self.trainer.run.path))

    # --------------------------------------------------------------------------------------------------------
    # From the run folder to the engine, and back

    def _receive(self) -> dict[str, dict[str, Tensor]]:
        """Fills the model with what is committed; rank 0 reads it for all. Returns the moments."""
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in MOMENTS}
        for key, layout in self.layouts.items():
            buffer = aligned_buffer(layout.total_bytes)
            if self.attempt is not None:
                self.attempt.stream.block_store.read(key, buffer)
            whole = buffer.to(self.device.torch)
            dist.broadcast(whole, 0)
            for name, views in _fields(layout, whole).items():
                for parameter, value in views.items():
                    if name == "weights":
                        self.parameters[parameter].data.copy_(value)
                    elif self.visits_done:
                        moments[name][parameter] = value.clone()
        return moments

    def _take_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        self._make_state()
        for name, values in moments.items():
            for parameter, value in values.items():
                safe_set_full_optimizer_state(self.parameters[parameter], value, name)
        steps = self.trainer.queue.steps_done(self.visits_done)
        for state in self._optimizer().state.values():
            if "step" in state:
                state["step"].fill_(float(steps))

    def _make_state(self) -> None:
        """Makes the moments before the first step, and lets parameters find theirs.

        DeepSpeed does it in the first step: ZeRO 1 and 2 after that of the first group of parameters, and the
        second group is forgotten then.
        """
        zero, inner = self.engine.optimizer, self._optimizer()
        whole = self.engine.zero_optimization_stage() == 3
        groups = [zero.fp32_partitioned_groups_flat] if whole else [g["params"] for g in inner.param_groups]
        for flat in (flat for group in groups for flat in group):
            if flat is not None and not inner.state[flat]:  # None: it is on the disk
                made = {name: torch.zeros_like(flat, memory_format=torch.preserve_format) for name in MOMENTS}
                inner.state[flat] = {"step": torch.tensor(0.0), **{k: v.detach() for k, v in made.items()}}
        if not whole:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _optimizer(self) -> torch.optim.Optimizer:
        inner = self.engine.optimizer
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        found: torch.optim.Optimizer = inner
        return found

    def _gathered(self, layout: ArenaLayout) -> Tensor | None:
        """The arena of a block, on rank 0, in host memory. Every rank takes part."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        arena = Arena(layout, aligned_buffer(layout.total_bytes)) if self.attempt else None
        fields = _fields(layout, arena.buffer) if arena else {}
        for slot in layout.slots:
            parameter = self.parameters[slot.name]
            found = {"weights": safe_get_full_fp32_param(parameter)}
            found |= {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            for name, views in fields.items():
                views[slot.name].copy_(found[name].view(slot.shape))
        return None if arena is None else arena.buffer

    # --------------------------------------------------------------------------------------------------------
    # Visits

    def train(self, batches: Batches) -> RunState | None:
        """All visits that are still to make. Returns on rank 0 the committed state."""
        with Monitor(self.plan.profile.unified, self.device) as monitor:
            for visit, _ in self.trainer.queue.pending(self.visits_done):
                losses = [self._step(visit, step, batches) for step in _steps(visit)]
                self._commit(visit, torch.stack(losses).mean(), monitor)
        return None if self.attempt is None else self.attempt.state

    def _step(self, visit: Visit, step: int, batches: Batches) -> Tensor:
        """One step on this rank's rows. Returns the mean loss over all ranks."""
        start, lr = time.perf_counter(), learning_rate(step, self.recipe.train)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        batch = checked_batch(batches(step), self.trainer.example, self.recipe.train.batch_size, step)
        parts = self.engine.gradient_accumulation_steps()
        total = torch.zeros((), device=self.device.torch)
        for own in range(parts):
            part = self.ranks.rank * parts + own
            torch.manual_seed(mix_seed(self.recipe.train.seed, "step", 0, step, part))
            rows = slice(part * self.micro, (part + 1) * self.micro)
            loss = self.engine({name: self.device.bring(value[rows]) for name, value in batch.items()})
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach() / parts
        dist.all_reduce(total)
        total /= self.ranks.size
        if self.attempt is not None:
            self.attempt.record_step(visit, step, lr, total, time.perf_counter() - start)
        return total

    def _commit(self, visit: Visit, loss: Tensor, monitor: Monitor) -> None:
        began, attempt, files = time.perf_counter(), self.attempt, {}
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"visit {visit.index}, from step {visit.first_step}: the loss is not finite; lower train.lr"
            )
        for key, layout in self.layouts.items():
            buffer = self._gathered(layout)
            if attempt is not None and buffer is not None:
                files[key] = attempt.stream.block_store.write(key, buffer, visit.index + 1)
        peak = monitor.run_peak
        record = RankRecord(
            rank=self.ranks.rank,
            device_peak_bytes=peak.device_bytes,
            host_peak_bytes=peak.host_bytes,
            traffic=Traffic(),
            transfer_s=TransferTimes(),
        )
        found = self.ranks.gathered(record.model_dump())
        if attempt is not None:
            attempt.record_late()
            state = attempt.next_state(visit, float(loss), {})
            every = [RankRecord(**each) for each in found]
            attempt.state = state.model_copy(update={"ranks": every})
            attempt.committer(attempt.state)(files)
            attempt.clock.commit_s += time.perf_counter() - began


def _steps(visit: Visit) -> Iterator[int]:
    yield from range(visit.first_step, visit.first_step + visit.num_steps)


def _fields(layout: ArenaLayout, buffer: Tensor) -> dict[str, dict[str, Tensor]]:
    """Weights and moments in an arena, by parameter."""
    arena = Arena(layout, buffer)
    flats = {"weights": arena.weights, **{name: arena.state[name] for name in MOMENTS}}
    return {name: parameter_views(layout, flat) for name, flat in flats.items()}


def fit_with_engine(
    ranks: Ranks, trainer: Trainer, build_model: Callable[[], Any], batches: Batches
) -> RunState | None:
    """Trains what is still to train. Returns on rank 0 the committed state. `ranks`: joined ones."""
    assert isinstance(ranks, JoinedRanks)
    if not ranks.leads:
        if ranks.told():
            EngineRun(ranks, trainer, build_model, None).train(batches)
        return None
    with Attempt(trainer.run, trainer.plan, trainer.model, trainer.listeners) as attempt:
        ranks.told(not attempt.finished)
        if attempt.finished:
            return attempt.state
        state = EngineRun(ranks, trainer, build_model, attempt).train(batches)
        attempt.recorder.write("trained", visits_done=attempt.state.visits_done)
        return state
