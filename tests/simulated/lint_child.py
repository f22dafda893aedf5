"""Looks at the operations of every objective, method, precision and optimizer on the simulated card.

    python lint_child.py CASES FOLDER

CASES: a list of [model, recipe changes] in JSON. FOLDER: a decoder of the Hugging Face library, or "". Prints
one line of JSON: what is wrong with each case, and what is found where a fault is planted in one.

    wait     the thread that computes waits for the card within a step
    mixed    an operation has tensors of the card and of the CPU
    random   an operation gives other bits in another run
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import simcuda  # before torch
import torch
import trainer_child
from torch import nn

import lowmem
from lowmem.recipe import Recipe
from lowmem.training.finite import FiniteWatch

assert simcuda
ROWS = 8
PAIR = (torch.zeros(ROWS, 4), torch.zeros(ROWS, dtype=torch.long))


def wrapped() -> Any:
    """A user's own layers and loss."""
    layers = [nn.Linear(32, 32) for _ in range(3)]
    loss = nn.functional.cross_entropy
    return lowmem.wrap(nn.Linear(4, 32), layers, nn.Linear(32, 16), loss, PAIR)


def pairs(step: int) -> Any:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(ROWS, 4, generator=generator)
    return inputs, torch.randint(16, (ROWS,), generator=generator)


def source(name: str, changes: dict[str, Any], folder: str) -> tuple[Recipe, Any, Any]:
    """Recipe, model and batches."""
    if name == "wrapped":
        changes = {**changes, "model": {"name": "custom"}}
        recipe, _ = trainer_child.setting("tied", {"train__batch_size": ROWS, **changes})
        return recipe, wrapped, pairs
    if name in ("decoder", "adapter"):
        import hf_training

        steps = {"train__num_steps": 6, "blocks__visit_steps": 3, "train__deterministic": True}
        model = {"name": "huggingface", "path": folder}
        if changes.get("method") == "diffusion_blocks":
            model["weights"] = "random"
        beside: dict[str, Any] = {"adapter": {"name": "lora", "r": 4}} if name == "adapter" else {}
        recipe, build = hf_training.setting(folder, "device", model=model, **steps, **beside, **changes)  # type: ignore[arg-type]
        return recipe, build, hf_training.batches
    recipe, build = trainer_child.setting(name, changes)
    return recipe, build, trainer_child.exact_runs.batches


def wrong(name: str, changes: dict[str, Any], folder: str) -> dict[str, Any]:
    """By kind, what is wrong; nothing where all is well."""
    recipe, build, batches = source(name, {"offload__tier": "device", **changes}, folder)
    try:
        found = trainer_child.trained(recipe, build, 0, batches=batches)
    except RuntimeError as problem:
        if "same device" not in str(problem):
            raise
        return {"mixed": str(problem)}
    looked = {"wait": found["waits"], "random": found["odd"], "order": found["races"]}
    return {kind: value for kind, value in looked.items() if value}


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    look = FiniteWatch.look

    def look_and_err(self: FiniteWatch, step: int, *values: torch.Tensor) -> None:
        if fault == "wait":
            values[0].item()
        elif fault == "mixed":
            values[0].expand(2) + torch.zeros(2)
        else:
            values[0].expand(2).cumsum(0)
        look(self, step, *values)

    with mock.patch.object(FiniteWatch, "look", look_and_err):
        yield


def main() -> None:
    cases, folder = json.loads(sys.argv[1]), sys.argv[2]
    trainer_child.prepare()
    found = [wrong(name, changes, folder) for name, changes in cases]
    controls = {}
    for fault in ("wait", "mixed", "random"):
        with planted(fault):
            controls[fault] = wrong("vit", {"method": "diffusion_blocks"}, folder)
    print(json.dumps({"found": found, "controls": controls}), flush=True)
    os._exit(0)  # the simulated card must not be torn down in any order


if __name__ == "__main__":
    main()
