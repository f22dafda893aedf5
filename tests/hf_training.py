"""Decoders of every family trained for a few steps: what the tests of it share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import recipe_with
from hf_folders import FAMILIES, LENGTH, VOCAB
from torch import Tensor

from lowmem.blocks.arena import Arena, aligned_buffer, parameter_views
from lowmem.blocks.run_dir import RunDir
from lowmem.blocks.store import DiskStore
from lowmem.data.datasets import DataSpec
from lowmem.machine.profile import load_profile
from lowmem.models.base import BuildModel
from lowmem.objectives.next_tokens import IGNORED
from lowmem.planning.duration import Work
from lowmem.planning.passes import Pass, PassCounter
from lowmem.planning.plan import Plan, make_plan
from lowmem.planning.settings import base_layout_of, layouts_of
from lowmem.recipe import Recipe
from lowmem.schedule import learning_rate, mix_seed
from lowmem.training.open_run import layouts_by_key
from lowmem.training.trainer import Trainer

BATCH, STEPS = 4, 10
MOMENTS = ("exp_avg", "exp_avg_sq")


def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """To count them takes longer than the runs do, and every run here fits."""
    for name in ("_count", "_count_streamed"):
        monkeypatch.setattr(PassCounter, name, lambda *_: Pass(1, Work(), Work()))


def batches(step: int) -> dict[str, Tensor]:
    """Rows with labels of different numbers: a question has none, nor has padding."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = labels[0, :9] = labels[2, 5:] = IGNORED
    return {
        "tokens": tokens,
        "labels": labels,
        "share": torch.full((BATCH,), BATCH / int((labels >= 0).sum())),
    }


def setting(folder: Path, tier: str, **overrides: Any) -> tuple[Recipe, BuildModel]:
    train = {"num_steps": STEPS, "lr": 1e-2, "warmup_steps": 3, "batch_size": BATCH, "seq_len": LENGTH}
    changes: dict[str, Any] = {
        "method": "end_to_end",
        "data": {"name": "custom"},
        "model": {"name": "huggingface", "path": str(folder)},
        "train": {**train, "micro_batch_size": BATCH},
        "blocks": {"num_blocks": 3, "visit_steps": 5},
        "optimizer": {"name": "adamw", "grad_clip": None, "weight_decay": 0.1},
        "offload__tier": tier,
    }
    recipe = recipe_with(**{**changes, **overrides})
    return recipe, recipe.model.builder(recipe, DataSpec(vocab_size=VOCAB, seq_len=LENGTH))


def plain_loop(
    folder: Path, recipe: Recipe, kind: str, trained: Callable[[str], bool] = lambda _: True
) -> dict[str, Tensor]:
    """transformers' own model from the folder, and torch's AdamW. `trained`: by the names of parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FAMILIES[kind].model_class().from_pretrained(folder, dtype=torch.float32)
    model.set_attn_implementation(FAMILIES[kind].attention)
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    decayed = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    others = [p for p in model.parameters() if p.ndim < 2 and p.requires_grad]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    betas = recipe.optimizer.betas
    optimizer = torch.optim.AdamW(groups, betas=(betas[0], betas[1]), eps=recipe.optimizer.eps, fused=True)
    for step in range(STEPS):
        torch.manual_seed(mix_seed(recipe.train.seed, "step", 0, step, 0))
        batch = batches(step)
        logits = model(input_ids=batch["tokens"]).logits
        losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        (losses.view(batch["labels"].shape).sum(1) * batch["share"]).mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.train)
        optimizer.step()
        optimizer.zero_grad()
    found = {}
    for name, parameter in model.named_parameters():
        found[f"{name} weight"], state = parameter.detach(), optimizer.state.get(parameter, {})
        found.update({f"{name} {field}": state[field] for field in MOMENTS if field in state})
    return found


def trained(run_dir: Path, folder: Path, tier: str, **overrides: Any) -> tuple[Plan, dict[str, Tensor]]:
    """Everything that the finished run holds, by name: weights and both moments."""
    recipe, build = setting(folder, tier, **overrides)
    plan = make_plan(build, recipe, load_profile("cpu-4gib"))
    state = Trainer(build, plan, run_dir).fit(batches)
    with torch.device("meta"):
        model = build()
    layouts, shared = layouts_of(model, plan.settings)
    store, found = (
        DiskStore(
            RunDir(run_dir),
            layouts_by_key(layouts, shared, base_layout_of(model, plan.settings)),
            state.files,
        ),
        {},
    )
    for key, layout in store.layouts.items():
        arena = Arena(layout, aligned_buffer(layout.total_bytes))
        store.read(key, arena.buffer)
        flat = {"weight": arena.weights, **arena.state}
        found.update(
            {
                f"{name} {field}": view
                for field, values in flat.items()
                if values.numel() == layout.numel
                for name, view in parameter_views(layout, values).items()
            }
        )
    store.close()
    return plan, found
