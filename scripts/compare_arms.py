"""The arms of `scripts/compare`: one model, the same tokens, the same first weights, trained in many ways.

`compare_arms.py JOB RESULT` trains one arm in this process. JOB is the JSON of a `Job`, RESULT the file that
gets losses and figures, or the reason why the arm cannot run here. Every arm makes its layers' activations
again in backward. Arms that share AdamW in fp32 have the losses of `plain`; GaLore, APOLLO, AdaLomo, BAdam
and the 8-bit states are other optimizers, at the settings that their authors recommend.

With the method diffusion_blocks, blocks are trained one after the other, each for an equal number of steps:
`plain` is then a loop of torch over the same layers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkout  # noqa: F401 (makes the package importable)
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lowmem.models.causal_lm import CausalLm
from lowmem.recipe import Recipe, recipe_from_dict
from lowmem.schedule import mix_seed

VOCAB = 256
LR, DECAY, BETAS, EPS = 1e-3, 0.1, (0.9, 0.95), 1e-8
RANK, GAP = 128, 200  # of the optimizers that project gradients: rank at most, steps between projections


@dataclass(frozen=True)
class Job:
    arm: str
    layers: int
    dim: int
    num_blocks: int
    batch_size: int
    seq_len: int
    steps: int
    warm_up: int  # steps before those that are measured
    seed: int
    precision: str
    threads: int
    folder: str  # scratch of this run alone
    memory_gib: float  # what the arm may take
    method: str = "end_to_end"  # or diffusion_blocks

    @property
    def whole(self) -> bool:
        return self.method == "end_to_end"

    @property
    def visit_steps(self) -> int:
        """Of the model, or of each block where blocks are trained alone."""
        return self.all_steps if self.whole else self.all_steps // self.num_blocks

    @property
    def all_steps(self) -> int:
        return self.warm_up + self.steps


@dataclass
class Meter:
    """Losses of all steps, and what the measured ones took."""

    job: Job
    losses: list[float] = field(default_factory=list)
    marks: list[dict[str, float]] = field(default_factory=list)

    def step(self, loss: float) -> None:
        self.losses.append(loss)
        if len(self.losses) in (self.job.warm_up, self.job.all_steps):
            self.marks.append(counters())

    def result(self) -> dict[str, Any]:
        first, last, end = *self.marks, counters()
        spent = {name: (last[name] - first[name]) / self.job.steps for name in first}
        after = {name: end[name] - last[name] for name in ("seconds", "write_bytes")}
        parameters = sum(p.numel() for p in Whole(self.job).parameters())
        figures = {"parameters": parameters, "per_step": spent, "after_last_step": after}
        return {"losses": self.losses, **figures}


def counters() -> dict[str, float]:
    """Of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    times = {"seconds": time.perf_counter(), "processor_s": used.ru_utime + used.ru_stime}
    return {**times, "kernel_s": used.ru_stime, **{name: float(value) for name, value in lines}}


# ------------------------------------------------------------------------------------------------------------
# The model and its data


def recipe_of(job: Job, tier: str, num_blocks: int | str, optimizer: str) -> Recipe:
    model = {"num_layers": job.layers, "dim": job.dim, "num_heads": max(job.dim // 64, 1)}
    batch = {"batch_size": job.batch_size, "micro_batch_size": job.batch_size, "seq_len": job.seq_len}
    rate = {"lr": LR, "lr_schedule": "constant", "warmup_steps": 0, "seed": job.seed}
    update = {"name": optimizer, "betas": list(BETAS), "eps": EPS, "weight_decay": DECAY, "grad_clip": None}
    raw = {
        "schema": 1,
        "method": job.method,
        "model": {"name": "causal_lm", "noisy_input": "none", **model},
        "blocks": {"num_blocks": num_blocks, "visit_steps": job.visit_steps, "overlap_gamma": 0},
        "data": {"name": "custom"},
        "train": {
            "num_steps": job.visit_steps,
            "precision": job.precision,
            "recompute": True,
            **batch,
            **rate,
        },
        "optimizer": update,
        # Only `lowmem-auto` may keep layers in memory that its budget has room for.
        "offload": {"tier": tier, "resident_layers": "auto" if tier == "auto" else 0},
    }
    return recipe_from_dict(raw, "compare")


def batch_of(job: Job, step: int) -> dict[str, Tensor]:
    """Bytes drawn from seed and step; small ones are likelier, so that there is something to learn."""
    generator = torch.Generator().manual_seed(mix_seed(job.seed, "tokens", step))
    drawn = torch.rand(job.batch_size, job.seq_len, generator=generator)
    return {"tokens": (VOCAB * drawn**3).long()}


class Whole(nn.Module):
    """The model with its loss, as an `nn.Module` that other libraries can take."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        recipe = recipe_of(job, "device", job.num_blocks, "adamw")
        with torch.device("meta"):
            self.model = CausalLm(recipe.model, VOCAB, job.seq_len, job.whole)  # type: ignore[arg-type]
        self.objective = self.model.make_objective(recipe.noise)
        self.seed, self.bf16 = job.seed, job.precision == "bfloat16"

    def drawn(self) -> Whole:
        """In memory, with the first weights."""
        self.to_empty(device="cpu")
        self.draw()
        return self

    def draw(self) -> None:
        """Module by module, with the seeds of `lowmem.training.first_weights`."""
        layers = [(f"layers.{i}", layer) for i, layer in enumerate(self.model.layers)]
        others = [(name, part) for name, part in self.model.named_children() if name != "layers"]
        for name, part in layers + others:
            torch.manual_seed(mix_seed(self.seed, "weights", name))
            for owner in reversed(list(part.modules())):
                getattr(owner, "reset_parameters", lambda: None)()

    def forward(self, tokens: Tensor, **_: Any) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            losses = self.objective.end_to_end_loss(self.model.layers, {"tokens": tokens}, recompute=True)
            return {"loss": losses.mean()}


def loop(
    job: Job,
    meter: Meter,
    whole: nn.Module,
    update: Callable[[], Any] = lambda: None,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> None:
    for step in range(job.all_steps):
        loss = whole(**batch_of(job, step))["loss"]
        backward(loss)
        update()
        meter.step(float(loss.detach()))
        del loss


def decay_of(parameter: Tensor) -> float:
    return DECAY if parameter.ndim >= 2 else 0.0


def decay_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    every = list(parameters)
    return [
        {"params": [p for p in every if decay_of(p) == decay], "weight_decay": decay} for decay in (DECAY, 0)
    ]


# ------------------------------------------------------------------------------------------------------------
# Arms of plain torch


def stepped(job: Job, meter: Meter, whole: nn.Module, optimizer: Any) -> None:
    """A loop with an optimizer's step after backward."""

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    loop(job, meter, whole, update)


def torch_adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(decay_groups(parameters), lr=LR, betas=BETAS, eps=EPS, fused=True)


def plain(job: Job, meter: Meter) -> None:
    whole = Whole(job).drawn()
    if job.whole:
        stepped(job, meter, whole, torch_adamw(whole.parameters()))
    else:
        one_by_one(job, meter, whole)


def one_by_one(job: Job, meter: Meter, whole: Whole) -> None:
    """Each block alone, with the draws of this package, so that the losses are its own."""
    model, objective = whole.model, whole.objective
    shared = torch_adamw(p for name, p in model.named_parameters() if not name.startswith("layers."))
    for block, indices in enumerate(model.block_slices(job.num_blocks)):
        layers = nn.ModuleList(model.layers[i] for i in indices)
        optimizers = torch_adamw(layers.parameters()), shared
        interval = objective.interval(block, job.num_blocks, 0.0)
        for step in range(job.visit_steps):
            torch.manual_seed(mix_seed(job.seed, "step", block, step, 0))
            loss = objective.block_loss(layers, batch_of(job, step), interval, recompute=True).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            meter.step(float(loss.detach()))


def update_in_backward(parameter: nn.Parameter, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """AdamW for one parameter as soon as its gradient is whole."""
    count = torch.zeros(())
    rates: Any = {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS}
    rates |= {"weight_decay": decay_of(parameter), "amsgrad": False, "maximize": False}

    @torch.no_grad()
    def hook(p: Tensor) -> None:
        assert p.grad is not None
        adamw([p], [p.grad], [exp_avg], [exp_avg_sq], [], [count], fused=True, **rates)
        p.grad = None

    parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def in_backward(job: Job, meter: Meter) -> None:
    whole = Whole(job).drawn()
    for parameter in whole.parameters():
        update_in_backward(parameter, torch.zeros_like(parameter), torch.zeros_like(parameter))
    loop(job, meter, whole)


def mapped(job: Job, meter: Meter) -> None:
    """Weights and moments are one file, mapped; the kernel's page cache decides what is in memory."""
    whole = Whole(job)
    parameters = dict(whole.named_parameters())
    sizes = [p.numel() for p in parameters.values() for _ in range(3)]  # weight and moments side by side
    flat = torch.from_file(str(Path(job.folder, "mapped")), shared=True, size=sum(sizes))
    parts = iter(torch.split(flat, sizes))
    views = {name: [next(parts).view(p.shape) for _ in range(3)] for name, p in parameters.items()}
    whole.load_state_dict({name: view[0] for name, view in views.items()}, assign=True)
    whole.draw()
    for name, parameter in whole.named_parameters():
        update_in_backward(parameter, *views[name][1:])
    loop(job, meter, whole)


def fsdp2_offload(job: Job, meter: Meter) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    alone()
    whole = Whole(job).drawn()
    shard = functools.partial(
        fully_shard, mesh=init_device_mesh("cpu", (1,)), offload_policy=CPUOffloadPolicy(pin_memory=False)
    )
    for part in (*whole.model.layers, whole):
        shard(part)
    stepped(job, meter, whole, torch_adamw(whole.parameters()))


def alone() -> None:
    """A process group of this process alone, over no network."""
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)


# ------------------------------------------------------------------------------------------------------------
# Arms of other packages


def bnb8(job: Job, meter: Meter) -> None:
    bnb = importlib.import_module("bitsandbytes")
    whole = Whole(job).drawn()

    def hook(parameter: nn.Parameter, optimizer: Any) -> None:
        optimizer.step()
        optimizer.zero_grad()

    for p in whole.parameters():
        optimizer = bnb.optim.AdamW8bit([p], lr=LR, betas=BETAS, eps=EPS, weight_decay=decay_of(p))
        step = functools.partial(hook, optimizer=optimizer)
        p.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
    loop(job, meter, whole)


def deepspeed(job: Job, meter: Meter, stage: int, device: str) -> None:
    """ZeRO-3 makes its optimizer's state with a step on zero gradients: its count is one ahead of plain's.
    Its buffers are as large as this model's layers need: by default they alone would take gigabytes.
    """
    builders = importlib.import_module("deepspeed.ops.op_builder")
    if device == "nvme" and not builders.AsyncIOBuilder().is_compatible(verbose=False):
        raise RuntimeError("DeepSpeed's async_io cannot be compiled here: install libaio-dev")
    alone()
    library, whole = importlib.import_module("deepspeed"), Whole(job).drawn()
    if stage == 3:  # a parameter that is used outside its own module's forward
        library.zero.register_external_parameter(whole, whole.model.tokens.weight)
    offload = {"device": device, "nvme_path": job.folder}
    largest = max(p.numel() for p in whole.parameters())
    of_layer = sum(p.numel() for p in whole.model.layers[0].parameters())
    zero: dict[str, Any] = {"stage": stage, "offload_optimizer": offload, "reduce_bucket_size": largest}
    if stage == 3:
        zero["offload_param"] = {**offload, "buffer_size": largest}
        zero["sub_group_size"] = zero["stage3_max_live_parameters"] = 2 * of_layer
        zero["stage3_max_reuse_distance"] = zero["stage3_prefetch_bucket_size"] = of_layer
    config = {
        "train_batch_size": job.batch_size,
        "train_micro_batch_size_per_gpu": job.batch_size,
        "bf16": {"enabled": job.precision == "bfloat16"},
        "zero_optimization": zero,
    }
    cpu_adam = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    groups = decay_groups(whole.parameters())
    optimizer = cpu_adam(groups, lr=LR, betas=BETAS, eps=EPS, adamw_mode=True)
    engine = library.initialize(model=whole, optimizer=optimizer, config=config)[0]
    loop(job, meter, engine, engine.step, engine.backward)


def projecting_groups(whole: Whole, **settings: Any) -> list[dict[str, Any]]:
    """The layers' matrices, whose gradients are projected, and all other parameters."""
    inner = [p for p in whole.model.layers.parameters() if p.ndim == 2]
    chosen = set(map(id, inner))
    rank = min(RANK, max(min(p.shape) for p in inner) // 4)
    others = decay_groups(p for p in whole.parameters() if id(p) not in chosen)
    common = {"rank": rank, "update_proj_gap": GAP, "proj_type": "std", "weight_decay": DECAY}
    return [{"params": inner, **common, **settings}, *others]


def galore(job: Job, meter: Meter) -> None:
    whole = Whole(job).drawn()
    groups = projecting_groups(whole, scale=0.25)
    optimizer = importlib.import_module("galore_torch").GaLoreAdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    stepped(job, meter, whole, optimizer)


def apollo(job: Job, meter: Meter) -> None:
    whole = Whole(job).drawn()
    groups = projecting_groups(whole, scale=1, proj="random", scale_type="channel")
    optimizer = importlib.import_module("apollo_torch").APOLLOAdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    stepped(job, meter, whole, optimizer)


def lomo(job: Job, meter: Meter) -> None:
    alone()
    whole = Whole(job).drawn()
    optimizer = importlib.import_module("lomo_optim").AdaLomo(whole, lr=LR, weight_decay=DECAY)
    loop(job, meter, whole, backward=lambda loss: optimizer.fused_backward(loss, LR))


def badam(job: Job, meter: Meter) -> None:
    whole = Whole(job).drawn()
    optimizer = importlib.import_module("badam").BlockOptimizer(
        base_optimizer=torch_adamw(whole.parameters()),
        named_parameters_list=list(whole.named_parameters()),
        switch_block_every=50,
        block_prefix_list=[[f"model.layers.{i}."] for i in range(job.layers)],
        active_modules=["model.head.", "model.final_modulation."],  # zero at first: all else waits for them
        verbose=0,
    )
    stepped(job, meter, whole, optimizer)


def hf_trainer(job: Job, meter: Meter) -> None:
    transformers = importlib.import_module("transformers")
    rows = [{"tokens": row} for step in range(job.all_steps) for row in batch_of(job, step)["tokens"]]
    whole = Whole(job).drawn()
    recorded: list[Tensor] = []
    whole.register_forward_hook(lambda _, __, out: recorded.append(out["loss"].detach()))

    class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    class AtStep(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step(float(recorded[-1]))

    rates = {"learning_rate": LR, "weight_decay": DECAY, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1]}
    run = {"max_steps": job.all_steps, "per_device_train_batch_size": job.batch_size, "use_cpu": True}
    still = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    arguments = transformers.TrainingArguments(
        job.folder,
        optim="adamw_torch_fused",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **rates,
        **run,
        **still,
    )
    InOrder(model=whole, args=arguments, train_dataset=rows, callbacks=[AtStep()]).train()


# ------------------------------------------------------------------------------------------------------------
# Arms of this package


def lowmem(
    job: Job, meter: Meter, tier: str, num_blocks: int | str | None = None, optimizer: str = "adamw"
) -> None:
    from lowmem.machine.profile import profile_from_dict
    from lowmem.planning.plan import make_plan
    from lowmem.training.trainer import Trainer

    recipe = recipe_of(job, tier, num_blocks or job.num_blocks, optimizer)
    memory = {"memory_gib": job.memory_gib, "reserve_gib": 0.0}
    machine = {
        "schema": 1,
        "name": "compared",
        "device": {"type": "cpu", "compute_dtype": job.precision, **memory},
        "host": memory,
        "disk": {"reserve_gib": 1.0},
        "source": "the memory that every arm has",
    }

    def build() -> CausalLm:
        return CausalLm(recipe.model, VOCAB, job.seq_len, job.whole)  # type: ignore[arg-type]

    def listen(record: dict[str, Any]) -> None:
        if record["event"] == "step":
            meter.step(record["loss"])

    run_dir = Path(job.folder, "run")
    plan = make_plan(build, recipe, profile_from_dict(machine, "compare"), run_dir)
    Trainer(build, plan, run_dir, [listen]).fit(functools.partial(batch_of, job))


ARMS: dict[str, Callable[[Job, Meter], None]] = {
    "plain": plain,
    "in-backward": in_backward,
    "mapped": mapped,
    "bnb8": bnb8,
    "deepspeed-2-cpu": functools.partial(deepspeed, stage=2, device="cpu"),
    "deepspeed-3-cpu": functools.partial(deepspeed, stage=3, device="cpu"),
    "deepspeed-3-nvme": functools.partial(deepspeed, stage=3, device="nvme"),
    "galore": galore,
    "apollo": apollo,
    "lomo": lomo,
    "badam": badam,
    "hf-trainer": hf_trainer,
    "fsdp2-offload": fsdp2_offload,
    "lowmem-resident": functools.partial(lowmem, tier="device"),
    "lowmem-disk": functools.partial(lowmem, tier="disk"),
    "lowmem-layers": lambda job, meter: lowmem(job, meter, "disk", job.layers),
    "lowmem-8bit": functools.partial(lowmem, tier="disk", optimizer="adamw8bit"),
    "lowmem-auto": functools.partial(lowmem, tier="auto", num_blocks="auto"),
}


def main() -> None:
    job, result = Job(**json.loads(sys.argv[1])), Path(sys.argv[2])
    torch.set_num_threads(job.threads)
    meter = Meter(job)
    try:
        ARMS[job.arm](job, meter)
        found = meter.result()
    except Exception as problem:
        lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
        found = {"why": f"{type(problem).__name__}: {lines[0] if lines else ''}"}
        raise
    finally:
        with contextlib.suppress(UnboundLocalError):  # interrupted
            result.write_text(json.dumps(found))
    os._exit(0)  # other libraries' threads and exit handlers have nothing left to do


if __name__ == "__main__":
    main()
