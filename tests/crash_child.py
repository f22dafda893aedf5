"""What the crash tests run in a process of its own, to be killed: a short run of the digits recipe."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from conftest import recipe_with


def train_short(folder: str, overrides: dict[str, Any], die_at_fsync: int | None = None) -> None:
    """Trains to the end; with `die_at_fsync` kills itself, as `kill -9` does, at that call of fsync (0 is the first)."""
    import torch

    from lowmem.data import describe_data, load_data
    from lowmem.hardware import load_profile
    from lowmem.models import model_builder
    from lowmem.plan import make_plan, read_plan
    from lowmem.run_dir import RunDir
    from lowmem.trainer import Trainer

    torch.set_num_threads(1)
    if die_at_fsync is not None:
        real_fsync, calls = os.fsync, iter(range(1_000_000))

        def fsync(handle: int) -> None:
            if next(calls) == die_at_fsync:
                os.kill(os.getpid(), signal.SIGKILL)
            real_fsync(handle)

        os.fsync = fsync
    recipe = recipe_with(**overrides)
    build = model_builder(recipe, describe_data(recipe))
    run = RunDir(Path(folder))
    plan = read_plan(run) if run.exists() else make_plan(build, recipe, load_profile("cpu-4gib"))
    data = load_data(recipe)
    Trainer(build, plan, folder).fit(lambda step: data.batch(0, step, recipe.train.batch_size))
