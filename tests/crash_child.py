"""A short run of the digits recipe, for the crash tests to run in a process of its own and to kill."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

from conftest import recipe_with


def train_short(folder: str, overrides: dict[str, Any], die_at: tuple[str, int] | None = None) -> None:
    """Trains to the end. With `die_at` it kills itself, as `kill -9` does, at that call of fsync, or of write
    to a block's file (0 is the first). With moment -1 it writes beside the folder how many calls there were.
    """
    import torch

    from lowmem.blocks.run_dir import RunDir
    from lowmem.data.datasets import describe_data, load_data
    from lowmem.machine.profile import load_profile
    from lowmem.models import model_builder
    from lowmem.planning.plan import make_plan, read_plan
    from lowmem.training.trainer import Trainer

    torch.set_num_threads(1)
    calls = iter(range(1_000_000))
    if die_at is not None:
        call, moment = die_at

        def count(name: str) -> None:
            if name == call and next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        real_fsync, real_file = os.fsync, io.FileIO

        def fsync(handle: int) -> None:
            count("fsync")
            real_fsync(handle)

        class File(real_file):  # type: ignore[misc,valid-type]
            def write(self, data: Any) -> Any:
                count("write")
                return super().write(data)

        os.fsync, io.FileIO = fsync, File  # type: ignore[misc]
    recipe = recipe_with(**overrides)
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    run = RunDir(Path(folder))
    plan = read_plan(run) if run.exists() else make_plan(build, recipe, load_profile("cpu-4gib"))
    data = load_data(recipe.data, recipe.train.seq_len)
    Trainer(build, plan, folder).fit(lambda step: data.batch(0, step, recipe.train.batch_size))
    if die_at is not None and die_at[1] < 0:
        Path(f"{folder}.count").write_text(str(next(calls)))
