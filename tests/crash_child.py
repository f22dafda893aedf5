"""Short runs, for the crash tests to run in a process of their own and to kill."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import recipe_with


def train_short(folder: str, overrides: dict[str, Any], die_at: tuple[str, int] | None = None) -> None:
    """Trains to the end. `die_at`: see `mortal`."""
    import torch

    from lowmem.blocks.run_dir import RunDir
    from lowmem.data.datasets import describe_data, load_data
    from lowmem.machine.profile import load_profile
    from lowmem.models import model_builder
    from lowmem.planning.plan import make_plan, read_plan
    from lowmem.training.trainer import Trainer

    torch.set_num_threads(1)
    with mortal(folder, die_at):
        recipe = recipe_with(**overrides)
        build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
        run = RunDir(Path(folder))
        plan = read_plan(run) if run.exists() else make_plan(build, recipe, load_profile("cpu-4gib"))
        data = load_data(recipe.data, recipe.train.seq_len)
        Trainer(build, plan, folder).fit(lambda step: data.batch(0, step, recipe.train.batch_size))


def finetune_short(
    folder: str, model: str, rows: str, overrides: list[str], die_at: tuple[str, int] | None = None
) -> None:
    """Fine-tunes a decoder from a folder to the end. `die_at`: see `mortal`."""
    import torch

    from lowmem import job
    from lowmem.finetuning import finetune_recipe
    from lowmem.planning.duration import Work
    from lowmem.planning.passes import Pass, PassCounter

    torch.set_num_threads(1)
    # Every run fits, and counting takes longer than the run.
    for name in ("_count", "_count_streamed", "_count_evaluated"):
        setattr(PassCounter, name, lambda *_: Pass(1, Work(), Work()))
    with mortal(folder, die_at):
        job.train(finetune_recipe(Path(model), Path(rows), overrides), "cpu-4gib", folder)


@contextlib.contextmanager
def mortal(folder: str, die_at: tuple[str, int] | None) -> Iterator[None]:
    """With `die_at` the process kills itself, as `kill -9` does, at that call of fsync, or of write to a
    block's file (0 is the first). With moment -1 it writes beside the folder how many calls there were.
    """
    if die_at is None:
        yield
        return
    (call, moment), calls = die_at, iter(range(1_000_000))

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
    yield
    if moment < 0:
        Path(f"{folder}.count").write_text(str(next(calls)))
