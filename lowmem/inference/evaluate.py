"""How good a run is: opens its folder and hands it to the evaluation of its kind of target."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.data.config import TextConfig
from lowmem.data.datasets import Dataset, DataSpec, describe_data, load_data
from lowmem.data.given import test_part
from lowmem.errors import ConfigError
from lowmem.files import printable
from lowmem.inference.frozen_run import FrozenRun, open_run
from lowmem.inference.kinds import kind_of
from lowmem.inference.progress import Progress, Say, silent
from lowmem.models.base import BuildModel
from lowmem.planning.plan import Plan
from lowmem.planning.run_data import own_data, spec_of, tokenizer_of
from lowmem.recipe import with_data
from lowmem.units import format_bytes


def evaluate_run(
    run_dir: str | os.PathLike[str],
    data: Sequence[str] | Iterable[object] | None = None,
    say: Say = silent,
    build_model: BuildModel | None = None,
) -> dict[str, Any]:
    """Metrics of a run's last commit on its test data.

    They hold `metric`, `value`, `per_block`, `levels`, and for discrete targets `sigma_max_ce`. `data` are
    `key=value` overrides of the recipe's data section, to evaluate on other data; text is read with the run's
    own tokenizer. Of a model of your own (`build_model`) they are batches, as `Trainer.fit` takes them from a
    DataLoader. `say` is given a line every few seconds, with the share of the present stage that is done.

    Raises ResumeError if the folder holds no run, StoreError if a file is torn, DataError if the data cannot
    be read, ConfigError if the other data are not of the shape, classes or vocabulary that the run was
    trained on.
    """
    with open_run(run_dir, build_model=build_model) as frozen, torch.no_grad():
        return _evaluated(frozen, _data_set(frozen.plan, data, build_model is not None), say)


def _data_set(plan: Plan, data: Sequence[str] | Iterable[object] | None, own_model: bool) -> Dataset:
    if own_model:
        return test_part(() if data is None else data)
    given = [str(each) for each in data or ()]
    return _other_data(plan, given) if given else own_data(plan)


def evaluate_on(run_dir: str | os.PathLike[str], data: Dataset, say: Say = silent) -> dict[str, Any]:
    """Metrics of a run's last commit on data that are open already."""
    with open_run(run_dir) as frozen, torch.no_grad():
        return _evaluated(frozen, data, say)


def _evaluated(frozen: FrozenRun, data: Dataset, say: Say) -> dict[str, Any]:
    kind = kind_of(frozen)
    with shown_progress(frozen, data.num_test, say):
        return kind.evaluate(frozen, data)


@contextlib.contextmanager
def shown_progress(frozen: FrozenRun, num_test: int, say: Say) -> Iterator[None]:
    """While the evaluation of so many test samples runs, says how far it is, by the samples that have passed
    the layers.

    An evaluation whose batches are cut to stay in the budget says that first.
    """
    sizes = frozen.size_for(num_test)
    if sizes.is_split:
        allowed = format_bytes(frozen.plan.budget.device_bytes)
        say(
            f"evaluation: batches of {sizes.batch_size} in micro-batches of {sizes.micro_batch_size}, "
            f"to stay within the budget of {allowed}",
            0.0,
        )
    begun: list[Progress] = []  # at the first pass: what comes before it is a stage of its own

    def passed(layer: nn.Module, given: tuple[Tensor, ...], h: Tensor) -> None:
        if not begun:
            begun.append(Progress(say, "evaluation", sizes.layer_calls))
        begun[0].add(len(h))

    frozen.say = say
    hooks = [layer.register_forward_hook(passed) for layer in frozen.model.layers]
    try:
        yield
    finally:
        frozen.say = silent
        for hook in hooks:
            hook.remove()


def _other_data(plan: Plan, overrides: Sequence[str]) -> Dataset:
    """Data of the run's own kind. Raises ConfigError where their shape, classes or vocabulary differ."""
    recipe, spec = plan.recipe, spec_of(plan)
    other = with_data(recipe, overrides)
    if other.data.remote and not any(override.startswith("dataset=") for override in overrides):
        raise ConfigError(
            f"--data: found {', '.join(overrides)}; allowed with data.name: '{other.data.name}': also the "
            "name of the data set, because the network may be used; add --data dataset=NAME"
        )
    tokenizer = None
    if isinstance(recipe.data, TextConfig) and isinstance(other.data, TextConfig):
        if any(override.startswith("tokenizer=") for override in overrides):
            raise ConfigError("--data tokenizer: the run's own tokenizer reads any text here; leave it out")
        tokenizer = tokenizer_of(plan)
    found = describe_data(other.data, other.train.seq_len, tokenizer)
    if found != spec:
        raise ConfigError(
            f"--data: found {_words(found)}; allowed: {_words(spec)}, as the run was trained on; "
            "give data of that kind"
        )
    trained_names = None if plan.data is None else plan.data.class_names
    names = None if trained_names is None else other.data.class_names
    if names is not None and names != trained_names:
        raise ConfigError(
            f"--data: found classes {', '.join(map(printable, names))}; allowed: "
            f"{', '.join(map(printable, trained_names or []))}, as the run was trained on; give such folders"
        )
    return load_data(other.data, other.train.seq_len, tokenizer, augmented=False)


def _words(spec: DataSpec) -> str:
    said = [field.name for field in fields(spec) if field.compare and getattr(spec, field.name) is not None]
    return ", ".join(f"{name} {getattr(spec, name)}" for name in said)
