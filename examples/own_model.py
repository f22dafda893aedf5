"""Trains a model of your own by exact back-propagation, within the budget of a machine.

python examples/own_model.py    seconds on a CPU, nothing to download; stopped, it goes on when run again
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lowmem

points = torch.randn(1024, 8, 16, generator=torch.Generator().manual_seed(0))
rows = TensorDataset(points, points.sum((1, 2)).gt(0).long())


def build_model() -> lowmem.BlockModel:
    layers = [nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True) for _ in range(4)]
    head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 2))
    return lowmem.wrap(nn.Linear(16, 64), layers, head, nn.functional.cross_entropy, example=rows[:1])


recipe = lowmem.load_recipe(__file__.replace(".py", ".yaml"))
plan = lowmem.make_plan(build_model, recipe, lowmem.load_profile("cpu-4gib"))
print(plan.table())
lowmem.Trainer(build_model, plan, run_dir="runs/own-model").fit(DataLoader(rows, 64, shuffle=True))
print(lowmem.read_report("runs/own-model").table())
