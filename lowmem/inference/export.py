"""`lowmem export`: a run's weights as ordinary safetensors files, one for each block, with an index that says
which holds what.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from lowmem.blocks.arena import Arena, ArenaLayout, aligned_buffer, parameter_views
from lowmem.blocks.run_dir import RunDir
from lowmem.blocks.stream import block_key
from lowmem.data.datasets import describe_data
from lowmem.errors import ConfigError
from lowmem.inference.frozen_run import FrozenRun
from lowmem.models import model_builder
from lowmem.planning.plan import read_plan

INDEX, RECIPE = "model.safetensors.index.json", "recipe.json"


def export_run(run_dir: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Writes the last commit's weights (their average where one is kept), without optimizer state, to a new
    folder. Returns it.

    One block is in memory at a time. Names are the model's own: `build_model().load_state_dict` takes all
    files' tensors together. Raises ResumeError if the folder holds no run, ConfigError if `out` exists or
    cannot be made.
    """
    folder, files, run = Path(out), dict[str, str](), RunDir(run_dir)
    plan = read_plan(run)
    with (
        FrozenRun(
            run, plan, model_builder(plan.recipe, describe_data(plan.recipe.data, plan.recipe.train.seq_len))
        ) as frozen,
        torch.no_grad(),
    ):
        try:
            folder.mkdir(parents=True)
        except OSError as problem:
            raise ConfigError(
                f"{folder}: {problem.strerror}; it is left as it is; give a folder that is not there yet"
            ) from None
        store, blocks = frozen.stream.block_store, range(plan.settings.num_blocks)

        def save(number: int, key: str, layout: ArenaLayout, buffer: torch.Tensor) -> None:
            views = parameter_views(layout, Arena(layout, buffer).result)
            name = f"model-{number:05d}-of-{len(blocks) + 1:05d}.safetensors"
            save_file(
                {parameter: view.cpu().clone() for parameter, view in views.items()},
                folder / name,
                metadata={"format": "pt", "part": key},
            )
            files.update(dict.fromkeys(views, name))

        for block in blocks:
            buffer = frozen.stream.load(block)
            save(block + 1, block_key(block), frozen.layouts[block], buffer)
            frozen.stream.release(block, buffer)
        shared = aligned_buffer(store.layouts["shared"].total_bytes)
        store.read("shared", shared)
        save(len(blocks) + 1, "shared", store.layouts["shared"], shared)
        total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        (folder / INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=1) + "\n",
            encoding="utf-8",
        )
        (folder / RECIPE).write_text(json.dumps(plan.recipe.to_dict(), indent=1) + "\n", encoding="utf-8")
    return folder
