"""`lowmem finetune` and `lowmem plan FOLDER`: the recipe that a model's folder and a file of rows make."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem import job
from lowmem.data.chat import ChatDataset
from lowmem.data.datasets import load_data
from lowmem.errors import ConfigError
from lowmem.models.huggingface.folder import CONFIG, read_config
from lowmem.recipe import Recipe, recipe_from_dict, with_overrides
from lowmem.reporting.telemetry import Listener

SEQ_LEN, BATCH_SIZE = 1024, 8
FULL_LR, ADAPTER_LR = 2e-5, 2e-4
NO_FILE = "rows.jsonl"  # stands for a file that a plan does without
NO_FILE_STEPS = 1000  # of such a plan
WARMUP_SHARE = 0.03  # of the steps


def is_model_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder with a config.json, and so no recipe."""
    return (Path(path) / CONFIG).is_file()


def finetune(
    folder: str | os.PathLike[str],
    data: str | os.PathLike[str],
    profile: str | os.PathLike[str] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    epochs: float = 1.0,
    adapter: str | None = None,
    listeners: Sequence[Listener] = (),
) -> Path:
    """Trains a model from a Hugging Face folder further, or goes on. Returns the run folder.

    See `finetune_recipe` and `lowmem.train`.
    """
    recipe = finetune_recipe(folder, data, overrides, epochs, adapter)
    return job.train(recipe, profile, run_dir or default_run_dir(folder), listeners=listeners)


def default_run_dir(folder: str | os.PathLike[str]) -> Path:
    return Path("runs") / Path(folder).resolve().name


def finetune_recipe(
    folder: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    epochs: float = 1.0,
    adapter: str | None = None,
) -> Recipe:
    """The recipe of fine-tuning: each layer a block, all else as the planner and the keys say.

    `adapter`: `lora` trains matrices beside frozen weights; None: all weights are trained.

    Without `data` it is enough for a plan, from config.json alone. `overrides`: `key=value` of a recipe.
    `epochs`: times that every row is trained on; `train.num_steps` among the overrides says it in steps.
    Raises ConfigError, and DataError where the rows or the tokenizer cannot be read.
    """
    path, where = Path(folder), f"finetune {Path(folder)}"
    defaults = _defaults(path, data, adapter)
    raw = with_overrides(defaults, overrides)
    trained, blocks = raw["model"].get("trainable"), defaults["blocks"]["num_blocks"]
    if type(trained) is int and type(blocks) is int and raw["blocks"]["num_blocks"] == blocks:
        raw["blocks"]["num_blocks"] = max(blocks - trained, 1)  # a block is of frozen layers
    recipe = recipe_from_dict(raw, where)
    if data is None:
        return recipe
    if not math.isfinite(epochs) or epochs <= 0:
        raise ConfigError(f"--epochs: found {epochs}; allowed: a number above 0")
    given = {override.partition("=")[0] for override in overrides}
    rows = load_data(recipe.data, recipe.train.seq_len)
    if "train.seq_len" not in given and isinstance(rows, ChatDataset):
        raw["train"]["seq_len"] = rows.width  # a plan for longer rows than there are would be too high
    if "train.num_steps" not in given:
        steps = max(math.ceil(rows.num_train * epochs / recipe.train.batch_size), 1)
        raw["train"]["num_steps"] = steps
        if "train.warmup_steps" not in given:
            raw["train"]["warmup_steps"] = min(round(WARMUP_SHARE * steps), steps)
    return recipe_from_dict(raw, where)


def _defaults(folder: Path, data: str | os.PathLike[str] | None, adapter: str | None) -> dict[str, Any]:
    config = read_config(folder)
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    longest = config.get("max_position_embeddings", config.get("n_positions"))
    rows: dict[str, Any] = {"name": "chat", "path": NO_FILE, "tokenizer": str(folder)}
    if data is None:
        rows["vocab_size"] = config.get("vocab_size")
    else:
        rows["path"] = os.fspath(data)
    return {
        "schema": 1,
        "method": "end_to_end",
        "model": {"name": "huggingface", "path": str(folder)},
        # A block is what one norm clips and what one file holds.
        "blocks": {"num_blocks": layers if isinstance(layers, int) else "auto"},
        "data": rows,
        "train": {
            "num_steps": NO_FILE_STEPS,
            "batch_size": BATCH_SIZE,
            "seq_len": min(SEQ_LEN, longest) if isinstance(longest, int) else SEQ_LEN,
            "lr": FULL_LR if adapter is None else ADAPTER_LR,
        },
        "optimizer": {"betas": [0.9, 0.999], "weight_decay": 0.01},
        **({} if adapter is None else {"adapter": {"name": adapter}}),
        "eval": {"batch_size": 32},
    }
