"""How good a run is: opens its folder and hands it to the evaluation of its kind of target."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from lowmem.blocks.run_dir import RunDir
from lowmem.data.config import TextConfig
from lowmem.data.datasets import Dataset, DataSpec, describe_data, load_data
from lowmem.data.text import load_tokenizer
from lowmem.errors import ConfigError
from lowmem.inference.evaluation import images, labels, masked, recurrent, tokens
from lowmem.inference.frozen_run import FrozenRun
from lowmem.models import model_builder
from lowmem.objectives.images import ImageDenoising
from lowmem.objectives.labels import LabelDenoising
from lowmem.objectives.masked import MaskedDenoising
from lowmem.objectives.recurrent import RecurrentDenoising
from lowmem.objectives.tokens import TokenDenoising
from lowmem.planning.plan import read_plan
from lowmem.recipe import Recipe, with_data


def evaluate_run(run_dir: str | os.PathLike[str], data: Sequence[str] | None = None) -> dict[str, Any]:
    """Metrics of a run's last commit on its test data: `metric`, `value`, `per_block`, `levels`, and for
    discrete targets `sigma_max_ce`.

    `data`: `key=value` overrides of the recipe's data section, to evaluate on other data; text is read with
    the run's own tokenizer.

    Raises ResumeError if the folder holds no run, StoreError if a file is torn, DataError if the data cannot
    be read, ConfigError if the other data are not of the shape, classes or vocabulary that the run was
    trained on.
    """
    run = RunDir(run_dir)
    plan = read_plan(run)
    spec = describe_data(plan.recipe.data, plan.recipe.train.seq_len)
    with FrozenRun(run, plan, model_builder(plan.recipe, spec)) as frozen, torch.no_grad():
        data_set = (
            _other_data(plan.recipe, spec, data)
            if data
            else load_data(plan.recipe.data, plan.recipe.train.seq_len, augmented=False)
        )
        objective = frozen.model.objective
        if isinstance(objective, LabelDenoising):
            return labels.evaluate(frozen, data_set)
        if isinstance(objective, ImageDenoising):
            return images.evaluate(frozen, data_set)
        if isinstance(objective, MaskedDenoising):
            return masked.evaluate(frozen, data_set)
        if isinstance(objective, RecurrentDenoising):
            return recurrent.evaluate(frozen, data_set)
        if isinstance(objective, TokenDenoising):
            return tokens.evaluate(frozen, data_set)
        # further kinds of target join here
    raise ConfigError(f"model.name: '{plan.recipe.model.name}' has no evaluation")


def _other_data(recipe: Recipe, spec: DataSpec, overrides: Sequence[str]) -> Dataset:
    other = with_data(recipe, overrides)
    tokenizer = None
    if isinstance(recipe.data, TextConfig) and isinstance(other.data, TextConfig):
        if any(override.startswith("tokenizer=") for override in overrides):
            raise ConfigError("--data tokenizer: the run's own tokenizer reads any text here; leave it out")
        tokenizer = load_tokenizer(recipe.data)
    found = describe_data(other.data, other.train.seq_len, tokenizer)
    if found != spec:
        raise ConfigError(
            f"--data: found {_words(found)}; allowed: {_words(spec)}, as the run was trained on; give data of that kind"
        )
    return load_data(other.data, other.train.seq_len, tokenizer, augmented=False)


def _words(spec: DataSpec) -> str:
    said = [field.name for field in fields(spec) if field.compare and getattr(spec, field.name) is not None]
    return ", ".join(f"{name} {getattr(spec, name)}" for name in said)
