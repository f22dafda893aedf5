"""Shared runs: small, real, made once a session."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# The models here are tiny. A team of threads would wait longer than it computes, above all while
# other work runs on the machine. Children of a test inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

# A plan is made in a child process, which imports this for some seconds, unless it is here already.
import torch._dynamo  # noqa: F401
from filelock import FileLock

from lowmem.blocks.run_dir import RunDir, RunState
from lowmem.data.cache import cache_dir
from lowmem.errors import DataError
from lowmem.machine.detect import detect_profile
from lowmem.machine.profile import Profile, load_profile
from lowmem.recipe import Recipe, recipe_from_dict

# Files of tests that take longest. They start first, so that no process is left alone with one at the end.
LONGEST = (
    "test_examples.py",
    "test_crash.py",
    "test_simulated_card.py",
    "test_ranks.py",
    "test_streamed_step.py",
    "test_typing.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


KEPT = cache_dir()  # of who runs the tests


def new_cache(folder: Path) -> str:
    """A cache folder without data. It has the figures of this installation, which take seconds to measure."""
    (folder / "lowmem").mkdir(parents=True, exist_ok=True)
    for figure in KEPT.glob("runtime-*.json"):
        shutil.copy(figure, folder / "lowmem")
    return str(folder)


TINY = {
    "schema": 1,
    "method": "diffusion_blocks",
    "model": {"name": "vit", "num_layers": 6, "dim": 64, "num_heads": 4, "patch_size": 2},
    "blocks": {"num_blocks": 3, "visit_steps": 25},
    "data": {"name": "digits"},
    "train": {"num_steps": 150, "batch_size": 64, "lr": 2e-3, "warmup_steps": 10},
    "optimizer": {"name": "adamw"},
}


def recipe_with(**overrides: Any) -> Recipe:
    """The tiny recipe with `section__key=value` changes."""
    raw = {name: dict(value) if isinstance(value, dict) else value for name, value in TINY.items()}
    for name, value in overrides.items():
        section, _, key = name.partition("__")
        if key:
            raw.setdefault(section, {})[key] = value  # type: ignore[index]
        else:
            raw[section] = value
    return recipe_from_dict(raw, "tiny")


SHORT = {
    "model__num_layers": 3,
    "model__dim": 32,
    "train__num_steps": 6,
    "train__warmup_steps": 2,
    "blocks__visit_steps": 2,
}


def run_short(
    folder: Path, listeners: Any = (), profile: Profile | None = None, **overrides: Any
) -> RunState:
    """Three blocks, three visits each, of the tiny recipe with changes."""
    from lowmem.data.datasets import describe_data, load_data
    from lowmem.models import model_builder
    from lowmem.planning.plan import make_plan
    from lowmem.training.trainer import Trainer

    recipe = recipe_with(**{**SHORT, **overrides})
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    plan = make_plan(build, recipe, profile or load_profile("cpu-4gib"), folder)
    data = load_data(recipe.data, recipe.train.seq_len)
    return Trainer(build, plan, folder, listeners).fit(
        lambda step: data.batch(0, step, recipe.train.batch_size)
    )


def first_weights(folder: Path, build: Any, plan: Any) -> tuple[RunDir, RunState]:
    """A run folder that has its first commit, and that commit."""
    import torch

    from lowmem.training.attempt import Attempt

    run = RunDir(folder)
    with torch.device("meta"):
        model = build()
    with Attempt(run, plan, model) as attempt:
        return run, attempt.state


def as_overrides(**overrides: Any) -> list[str]:
    """Arguments of `--set`, from the digits-vit recipe to the tiny one."""
    import yaml

    sections = {
        name: keys for name, keys in TINY.items() if isinstance(keys, dict) and name not in ("model", "data")
    }
    flat = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    flat.update({name.replace("__", "."): value for name, value in overrides.items()})
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
        for key, value in flat.items()
    ]


def text_of(recipe: Recipe) -> tuple[Any, int | None]:
    """What `describe_data` and `load_data` need of a recipe of text."""
    return recipe.data, recipe.train.seq_len


def data_refusal(recipe: Recipe) -> str:
    """The one line with which a recipe's data are refused."""
    from lowmem.data.datasets import describe_data, load_data

    with pytest.raises(DataError) as caught:
        describe_data(recipe.data, recipe.train.seq_len)
        load_data(recipe.data, recipe.train.seq_len)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def batches_digest(batches: Iterable[dict[str, np.ndarray[Any, Any]]]) -> str:
    whole = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            whole.update(name.encode() + batch[name].tobytes() + str(batch[name].dtype).encode())
    return whole.hexdigest()


def with_weights(model: Any, std: float) -> Any:
    """First weights, and random ones where training starts from zero (gates, read-outs), so that everything
    has an effect.
    """
    import torch

    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=std)
    return model


@pytest.fixture(scope="session")
def profile() -> Profile:
    """This machine, as detected."""
    return detect_profile()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits-vit, three blocks, 150 steps each, from disk. Each process of the suite has its own copy."""
    from lowmem.job import train

    overrides, own = as_overrides(offload__tier="disk"), tmp_path_factory.mktemp("runs") / "blocks"
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return train("digits-vit", "cpu-4gib", own, overrides)
    shared = tmp_path_factory.getbasetemp().parent / "trained"
    with FileLock(shared.with_suffix(".lock")):  # the first process trains, the others wait
        if not shared.exists():
            making = shared.with_suffix(".making")
            shutil.rmtree(making, ignore_errors=True)
            train("digits-vit", "cpu-4gib", making, overrides).rename(shared)
    return Path(shutil.copytree(shared, own))


@pytest.fixture(scope="session")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-alone control: as many layers as one block has, trained end to end for as many steps."""
    from lowmem.job import train

    overrides = as_overrides(model__num_layers=2, blocks__num_blocks=1)
    return train("digits-vit-end-to-end", "cpu-4gib", tmp_path_factory.mktemp("runs") / "control", overrides)
