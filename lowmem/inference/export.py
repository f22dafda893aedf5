"""`lowmem export`: a run's weights as ordinary safetensors files, one for each block, with an index of what
is where.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from lowmem.blocks.arena import Arena, ArenaLayout, parameter_views
from lowmem.blocks.stream import block_key
from lowmem.errors import ConfigError
from lowmem.inference.frozen_run import open_run

INDEX, RECIPE = "model.safetensors.index.json", "recipe.json"


def export_run(run_dir: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Writes the last commit's weights, or their average where one is kept, to a new folder. Returns it.

    Optimizer state is left out. One block is in memory at a time. Names are the model's own:
    `build_model().load_state_dict` takes all files' tensors together. Raises ResumeError if the folder holds
    no run, ConfigError if `out` exists or cannot be made.
    """
    folder, where = Path(out), dict[str, str]()
    with open_run(run_dir) as frozen, torch.no_grad():
        try:
            folder.mkdir(parents=True)
        except OSError as problem:
            raise ConfigError(
                f"{folder}: {problem.strerror}; it is left as it is; give a folder that is not there yet"
            ) from None
        stream, count = frozen.stream, len(frozen.blocks) + 1

        def save(number: int, key: str, layout: ArenaLayout, buffer: torch.Tensor) -> None:
            views = parameter_views(layout, Arena(layout, buffer).result)
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            copies = {parameter: view.cpu().clone() for parameter, view in views.items()}
            save_file(copies, folder / name, metadata={"format": "pt", "part": key})
            where.update(dict.fromkeys(views, name))

        for block in frozen.blocks:
            buffer = stream.load(block)
            save(block + 1, block_key(block), frozen.layouts[block], buffer)
            stream.release(block, buffer)
        save(count, "shared", frozen.shared_layout, stream.load_shared())
        total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write(folder / INDEX, index)
        _write(folder / RECIPE, frozen.plan.recipe.to_dict())
    return folder


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
