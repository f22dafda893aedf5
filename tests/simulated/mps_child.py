"""Trains `digits-vit` for a few steps under the profile of an Apple GPU, on a device with its limits.

    python mps_child.py RUN_FOLDER TIER

There is no float64, no 8-bit kernel and no page-locked memory, and the device shares the host's memory. It
prints the run's digest and settings as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import simcuda  # before torch
import torch
from simcuda import CUDA, WORLD, Card

from lowmem.data.datasets import describe_data, load_data
from lowmem.machine import device
from lowmem.machine.device import DeviceMemory, Mps
from lowmem.machine.profile import load_profile
from lowmem.models import model_builder
from lowmem.planning.plan import make_plan
from lowmem.recipe import load_recipe
from lowmem.reporting.report import digest
from lowmem.training.trainer import Trainer


class SimulatedMps(Mps):
    """An Apple GPU whose tensors are those of the simulated card."""

    def __init__(self) -> None:
        super().__init__()
        self.torch = CUDA

    def memory(self) -> DeviceMemory:
        return DeviceMemory(WORLD.live, WORLD.live, 0)

    def random_state(self) -> Any:
        return None


def main() -> None:
    torch.set_num_threads(1)
    simcuda.install()
    WORLD.has_float64 = False
    device.KINDS.update(mps=SimulatedMps, cuda=SimulatedMps)  # of a tensor's device, too
    device.mps_works = lambda: True
    changes = ["optimizer.name=adamw", "train.num_steps=4", "blocks.visit_steps=2", "train.warmup_steps=1"]
    recipe = load_recipe("digits-vit", [*changes, f"offload.tier={sys.argv[2]}"])
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    plan = make_plan(build, recipe, load_profile("apple-m2-16gb"))
    data = load_data(recipe.data, recipe.train.seq_len)
    with Card():
        state = Trainer(build, plan, sys.argv[1]).fit(lambda step: data.batch(0, step, 64))
        found = digest(state)
    print(
        json.dumps({"digest": found, "settings": plan.settings.model_dump(mode="json"), "locks": WORLD.locks})
    )
    sys.stdout.flush()
    os._exit(0)  # the simulated device must not be torn down in any order


if __name__ == "__main__":
    main()
