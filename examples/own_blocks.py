"""Trains a model of your own, block by block: plan, train, report, evaluate.

    python examples/own_blocks.py                        a few seconds on a CPU, nothing to download
    python examples/own_blocks.py --profile gtx-1650-4gb --plan-only

The model tells three spirals of points apart. It is a residual network in plain PyTorch, and five methods
connect it to lowmem. Kill the script and run it again: it goes on where it stood.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowmem
from lowmem.recipe import NoiseConfig

NUM_CLASSES = 3
DIM = 64
NUM_LAYERS = 6


class Residual(nn.Module):
    """One residual layer: h [B, 1, D] and a condition [B, 1, D] in, h [B, 1, D] out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.up = nn.Linear(DIM, 2 * DIM)
        self.down = nn.Linear(2 * DIM, DIM)

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        update: Tensor = self.down(F.gelu(self.up(self.norm(h) + cond)))
        return h + update


class Spirals(lowmem.BlockModel):
    """Points in the plane in, the logits of their spirals out.

    `layers` is cut into blocks. All other modules are the shared part, which every block trains. The model is
    built without memory first, so its modules need `reset_parameters()`; PyTorch's own modules have it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.point_in = nn.Linear(2, DIM)
        self.label_in = nn.Linear(DIM, DIM)
        self.level_in = nn.Linear(1, DIM)
        self.labels = nn.Embedding(NUM_CLASSES, DIM)
        self.layers = nn.ModuleList(Residual() for _ in range(NUM_LAYERS))
        self.head = nn.Linear(DIM, NUM_CLASSES)

    def make_objective(self, noise: NoiseConfig) -> lowmem.LabelDenoising:
        """How a block is scored: it names the label from the point and a noisy embedding of the label."""
        return lowmem.LabelDenoising(self, noise)

    def example_batch(self, batch_size: int) -> dict[str, Tensor]:
        """The shapes and types of a batch. The plan counts activations with it; the values do not matter."""
        return {"point": torch.zeros(batch_size, 2), "label": torch.zeros(batch_size, dtype=torch.long)}

    def target_table(self) -> Tensor:
        """[K, D]: the clean embeddings of the labels, at length 1."""
        return F.normalize(self.labels.weight.float(), dim=-1)

    def input_part(
        self, batch: dict[str, Tensor], noisy: Tensor | None, c_noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(h [B, 1, D], cond [B, 1, D]). `noisy` [B, D] and `c_noise` [B] are None in end-to-end training."""
        dtype = self.point_in.weight.dtype  # bfloat16 on a machine that computes in it
        h = self.point_in(batch["point"].to(dtype))
        if noisy is not None:
            h = h + self.label_in(noisy.to(dtype))
        level = torch.zeros_like(h[:, :1]) if c_noise is None else c_noise[:, None].to(dtype)
        return h[:, None], self.level_in(level)[:, None]

    def output_part(self, h: Tensor, cond: Tensor) -> Tensor:
        """Logits [B, K]."""
        logits: Tensor = self.head(h[:, 0])
        return logits


def batches(step: int, batch_size: int = 128) -> dict[str, Tensor]:
    """The batch of a step. It depends on the step alone, so a resumed run sees what an unbroken one does."""
    draw = torch.Generator().manual_seed(step)
    label = torch.randint(NUM_CLASSES, (batch_size,), generator=draw)
    radius = torch.rand(batch_size, generator=draw)
    angle = 4 * radius + 2 * torch.pi * label / NUM_CLASSES + 0.1 * torch.randn(batch_size, generator=draw)
    return {"point": radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1), "label": label}


def recipe_of(num_steps: int) -> lowmem.Recipe:
    """Three blocks of two layers, trained in visits of 50 steps. Each block gets `num_steps` steps."""
    return lowmem.recipe_from_dict(
        {
            "schema": 1,
            "method": "diffusion_blocks",
            "model": {"name": "custom"},
            "data": {"name": "custom"},
            "blocks": {"num_blocks": 3, "visit_steps": min(50, num_steps)},
            "train": {"num_steps": num_steps, "batch_size": 128, "lr": 3e-3, "seed": 0},
            "offload": {"tier": "disk"},
        },
        "own model",
    )


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--profile", default="cpu-4gib", help="a machine: see `lowmem profiles`")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/own-model"))
    parser.add_argument("--steps", type=int, default=300, help="of each block")
    parser.add_argument("--plan-only", action="store_true", help="print the plan and train nothing")
    given = parser.parse_args()

    recipe = recipe_of(given.steps)
    plan = lowmem.make_plan(Spirals, recipe, lowmem.load_profile(given.profile))
    print(plan.table())
    if given.plan_only:
        return
    lowmem.Trainer(Spirals, plan, run_dir=given.run_dir).fit(batches)
    print()
    print(lowmem.read_report(given.run_dir).table())
    new_points = [batches(10**6 + index) for index in range(16)]
    found = lowmem.evaluate_run(given.run_dir, new_points, build_model=Spirals)
    print(f"accuracy on new points: chain {found['chain_accuracy']:.1%}, joint {found['joint_accuracy']:.1%}")


if __name__ == "__main__":
    main()
