"""A model made to lose a race between copies and compute: its layers weigh much and do hardly any arithmetic.

In visits of one step. Two blocks: one is asked for again while it is still being written. Three: the slot
that one leaves is the next to be filled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.machine.profile import Profile
from lowmem.models.base import BlockModel
from lowmem.models.layers import Linear, Table, TimeEmbedding
from lowmem.objectives.base import Batch
from lowmem.objectives.labels import LabelDenoising
from lowmem.planning.plan import Plan, make_plan
from lowmem.recipe import NoiseConfig, recipe_from_dict
from lowmem.reporting.report import digest
from lowmem.training.trainer import Trainer

DIM = 32


class Thin(nn.Module):
    """Adds one row of a large table."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.table = Table(num_rows, DIM)

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        return h + self.table.weight[0].to(h.dtype) + 0 * cond


class Racing(BlockModel):
    """Rows of 16 numbers, 4 classes; each layer is a block."""

    def __init__(self, thin_rows: int, num_blocks: int) -> None:
        super().__init__()
        self.inward = Linear(16, DIM)
        self.label_in = Linear(DIM, DIM)
        self.labels = Table(4, DIM, std=1.0)
        self.time = TimeEmbedding(DIM)
        self.layers = nn.ModuleList(Thin(thin_rows) for _ in range(num_blocks))
        self.head = Linear(DIM, 4)

    def make_objective(self, noise: NoiseConfig) -> LabelDenoising:
        return LabelDenoising(self, noise)

    def example_batch(self, batch_size: int) -> Batch:
        return {"row": torch.zeros(batch_size, 16), "label": torch.zeros(batch_size, dtype=torch.long)}

    def target_table(self) -> Tensor:
        return self.labels.normalized()

    def input_part(self, batch: Batch, noisy: Tensor | None, c_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.inward(batch["row"])[:, None]
        if noisy is not None:
            h = torch.cat([h, self.label_in(noisy)[:, None]], 1)
        return h, self.time(torch.zeros(len(h), device=h.device) if c_noise is None else c_noise)

    def output_part(self, h: Tensor, cond: Tensor) -> Tensor:
        return torch.as_tensor(self.head(h[:, 0]))


def race_plan(profile: Profile, num_blocks: int, thin_rows: int, num_steps: int, **offload: Any) -> Plan:
    recipe = recipe_from_dict(
        {
            "schema": 1,
            "method": "diffusion_blocks",
            "model": {"name": "custom"},
            "data": {"name": "custom"},
            "blocks": {"num_blocks": num_blocks, "visit_steps": 1},
            "train": {
                "num_steps": num_steps,
                "batch_size": 2,
                "lr": 1e-2,
                "precision": "float32",
                "recompute": False,
                "deterministic": True,
            },
            "optimizer": {"name": "adamw"},
            "offload": offload,
        },
        "racing",
    )
    return make_plan(lambda: Racing(thin_rows, num_blocks), recipe, profile)


def race(folder: Path, plan: Plan, thin_rows: int) -> str | None:
    """The digest of a run."""

    def batches(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        return {
            "row": torch.randn(2, 16, generator=generator),
            "label": torch.randint(4, (2,), generator=generator),
        }

    return digest(Trainer(lambda: Racing(thin_rows, plan.settings.num_blocks), plan, folder).fit(batches))
