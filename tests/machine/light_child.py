"""Plans and trains a recipe for a few tiny steps, then prints which heavy modules this process has imported.

A process of its own: another test may have imported them. Arguments: the recipe and the run folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lowmem.data.datasets import describe_data, load_data
from lowmem.machine.profile import load_profile
from lowmem.models import model_builder
from lowmem.planning.plan import make_plan
from lowmem.recipe import load_recipe
from lowmem.training.trainer import Trainer

HEAVY = ("torch._dynamo", "torch._inductor", "sympy")
SETTINGS = [
    "model.num_layers=3",
    "model.dim=16",
    "model.num_heads=2",
    "blocks.visit_steps=1",
    "train.num_steps=2",
    "train.warmup_steps=0",
    "train.batch_size=2",
    "train.seq_len=8",
    "train.recompute=true",
    "optimizer.name=adamw",
    "offload.tier=disk",
    "offload.borders=disk",
]


def main() -> None:
    recipe = load_recipe(sys.argv[1], SETTINGS)
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    plan = make_plan(build, recipe, load_profile("cpu-4gib"))
    data = load_data(recipe.data, recipe.train.seq_len)
    trainer = Trainer(build, plan, Path(sys.argv[2]))
    state = trainer.fit(lambda step: data.batch(0, step, recipe.train.batch_size))
    assert plan.settings.tier == "disk" and state.visits_done == plan.queue().num_visits
    print(*(name for name in HEAVY if name in sys.modules))


if __name__ == "__main__":
    main()
