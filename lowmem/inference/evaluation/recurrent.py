"""Recurrent-depth language models: cross-entropy by number of iterations, and at sigma_max as a plain
prediction.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.common import headline, test_parts
from lowmem.inference.frozen_run import FrozenRun, initial_noise
from lowmem.models.base import BlockModel
from lowmem.noise import euler_step, sampler_grid
from lowmem.objectives.base import Batch, mean_cosine
from lowmem.objectives.recurrent import RecurrentDenoising
from lowmem.planning.evaluation import ITERATIONS
from lowmem.schedule import mix_seed


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    """`value` is at sigma_max in one pass (denoiser), or after the mean number of iterations (end to end)."""
    _, objective = frozen.parts(BlockModel, RecurrentDenoising)
    recipe = frozen.plan.recipe
    torch.manual_seed(mix_seed(recipe.train.seed, "evaluate"))
    batches = [part.batch for part in test_parts(frozen, data)]
    by_iterations: list[dict[str, float]] = []
    if recipe.whole:
        for count in ITERATIONS:
            by_iterations.append({"iterations": count, "ce": float(_loop(frozen, batches, count).mean())})
        figures = headline(_loop(frozen, batches, objective.iterations))
        return {**figures, "per_block": [], "iterations": by_iterations}
    with frozen.on_device(frozen.blocks) as layers:
        for count in ITERATIONS:
            parts = [_chain(frozen, layers, batch, count) for batch in batches]
            by_iterations.append({"iterations": count, "ce": float(torch.cat(parts).mean())})
        losses = torch.cat([_chain(frozen, layers, batch, 1) for batch in batches])
    figures = headline(losses)
    return {
        **figures,
        "sigma_max_ce": figures["value"],
        "per_block": [{"block": 0, "sigma_max_ce": figures["value"]}],
        "iterations": by_iterations,
        "table_cosine": mean_cosine(objective.model.target_table()),
    }


def _loop(frozen: FrozenRun, batches: list[Batch], iterations: int) -> Tensor:
    """Cross-entropy [B] after so many iterations."""
    _, objective = frozen.parts(BlockModel, RecurrentDenoising)
    return frozen.whole(
        batches,
        lambda batch: objective.entered(batch["tokens"], iterations),
        lambda batch, h, entered: objective.leave(h, entered.cond, entered.kept, batch),
    )


def _chain(frozen: FrozenRun, layers: Iterable[nn.Module], batch: Batch, iterations: int) -> Tensor:
    """Cross-entropy [B] of the last call of a chain of so many denoising iterations.

    One iteration is a plain prediction at sigma_max.
    """
    _, objective = frozen.parts(BlockModel, RecurrentDenoising)
    tokens, noise = batch["tokens"], objective.noise
    z = initial_noise((*tokens.shape, objective.target_shape()[1]), noise.sigma_max).to(tokens.device)
    grid = sampler_grid(iterations, noise)
    losses = torch.empty(0)
    for sigma, following in zip(grid, [*grid[1:], None], strict=True):
        levels = torch.full(tokens.shape, sigma, device=tokens.device)
        features = objective.features(layers, batch, z, levels)
        losses, denoised = objective.predictions(features, tokens, z, levels)
        if following is not None:
            z = euler_step(z, denoised, sigma, following)
    return losses.mean(1)
