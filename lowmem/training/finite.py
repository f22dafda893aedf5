"""Sees that a loss, a gradient or a weight is no longer a finite number, and says in which step and why.

The look is a flag on the device, so that CUDA never makes the host wait for it in a step. It is read where
the loss is read anyway: in every step on a CPU, at the end of a visit on CUDA. Both are before the commit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem.blocks.order import Visit
from lowmem.errors import TrainingError
from lowmem.machine.profile import CARDS
from lowmem.noise import Interval
from lowmem.recipe import Recipe

# (section, key, least and most of what trains as a rule): outside of it a setting is named as unusual
USUAL = (
    ("train", "lr", 1e-7, 1e-2),
    ("optimizer", "eps", 1e-12, 1e-4),
    ("optimizer", "weight_decay", 0.0, 1.0),
    ("optimizer", "grad_clip", 1e-3, 100.0),
    ("noise", "sigma_min", 1e-4, 1.0),
    ("noise", "sigma_max", 1.0, 1e3),
    ("noise", "sigma_data", 1e-2, 10.0),
)
LEAST_BETA = 0.5  # a smaller one averages over less than two steps
LARGEST_INPUT = 1e3  # data are scaled to about 1


class FiniteWatch:
    """Remembers the first step in which a number was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), -1, dtype=torch.int64, device=device)

    def look(self, step: int, *values: Tensor) -> None:
        """`values`: scalars on the device, such as a loss and norms."""
        total = torch.stack([value.float() for value in values]).sum()
        spoilt = torch.isfinite(total).logical_not() & (self._first < 0)
        self._first.masked_fill_(spoilt, step)

    @property
    def at_once(self) -> bool:
        """Whether the host may look in every step."""
        return self._first.device.type not in CARDS

    def first_step(self) -> int | None:
        """Waits for the device. None: all is finite so far."""
        step = int(self._first)
        return None if step < 0 else step


def not_finite(
    recipe: Recipe, visit: Visit, step: int, levels: Interval | None, batch: Mapping[str, Any]
) -> TrainingError:
    """What is said of a step whose loss, gradients or weights are not finite. `batch`: the step's."""
    found = [*_unusual_data(batch), *_unusual_settings(recipe)]
    low_high = "" if levels is None else f", levels {levels.low:.4g} to {levels.high:.4g}"
    if found:
        advice = f"unusual: {'; '.join(found)}; the last commit is kept: change that in another --run-dir"
    else:
        advice = (
            f"no setting is unusual; the last commit is kept: lower train.lr (now {recipe.train.lr:g}), or "
            f"optimizer.grad_clip (now {recipe.optimizer.grad_clip}), in another --run-dir"
        )
    return TrainingError(
        f"visit {visit.index}, block {_listed(visit.blocks)}, step {step}{low_high}: a loss, gradient or "
        f"weight is no longer a finite number; {advice}"
    )


def _listed(blocks: Sequence[int]) -> str:
    return str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"


def _unusual_data(batch: Mapping[str, Any]) -> Iterator[str]:
    for name, values in batch.items():
        tensor = torch.as_tensor(values)
        if not tensor.is_floating_point():
            continue
        broken = int(tensor.isfinite().logical_not().sum())
        if broken:
            yield f"the step's data, '{name}', have {broken} values that are not finite"
        elif float(tensor.abs().max()) > LARGEST_INPUT:
            largest = float(tensor.abs().max())
            yield f"the step's data, '{name}', reach {largest:.3g} (usual: at most {LARGEST_INPUT:g})"


def _unusual_settings(recipe: Recipe) -> Iterator[str]:
    for section, key, least, most in USUAL:
        value = getattr(getattr(recipe, section), key)
        if value is not None and not least <= value <= most:
            yield f"{section}.{key} {value:g} (usual: {least:g} to {most:g})"
    if recipe.optimizer.grad_clip is None:
        yield "optimizer.grad_clip null (usual: 1.0)"
    if recipe.train.precision == "float16":
        scale = recipe.optimizer.loss_scale
        yield f"train.precision float16, which ends at 65504, with optimizer.loss_scale {scale:g}: lower it"
    if min(recipe.optimizer.betas) < LEAST_BETA:
        yield f"optimizer.betas {recipe.optimizer.betas} (usual: {LEAST_BETA:g} or more)"
