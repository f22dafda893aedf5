"""Recurrent-depth language models: cross-entropy by number of iterations, and at sigma_max as a plain
prediction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.common import headline, test_batches
from lowmem.inference.frozen_run import FrozenRun
from lowmem.models.base import BlockModel
from lowmem.noise import euler_step, sampler_grid
from lowmem.objectives.base import Batch, mean_cosine
from lowmem.objectives.recurrent import RecurrentDenoising
from lowmem.schedule import mix_seed

ITERATIONS = (1, 2, 4, 8, 16, 32)


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    """`value` is at sigma_max in one pass (denoiser), or after the mean number of iterations (end to end)."""
    _, objective = frozen.parts(BlockModel, RecurrentDenoising)
    recipe = frozen.plan.recipe
    torch.manual_seed(mix_seed(recipe.train.seed, "evaluate"))
    batches = test_batches(frozen, data)
    by_iterations: list[dict[str, float]] = []
    if recipe.method == "end_to_end":
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
    model = objective.model
    return frozen.whole(
        batches,
        lambda batch: objective.entered(batch["tokens"], iterations),
        lambda batch, h, entered: _losses(
            objective.logits(model.features(h, entered.cond).flatten(0, 1), None, None), batch["tokens"]
        ),
    )


def _chain(frozen: FrozenRun, layers: Iterable[nn.Module], batch: Batch, iterations: int) -> Tensor:
    """Cross-entropy [B] of the last call of a chain of so many denoising iterations.

    One iteration is a plain prediction at sigma_max.
    """
    _, objective = frozen.parts(BlockModel, RecurrentDenoising)
    tokens, table, noise = batch["tokens"], objective.model.target_table(), objective.noise
    z = torch.randn(*tokens.shape, table.shape[1], device=tokens.device) * math.sqrt(1 + noise.sigma_max**2)
    grid = sampler_grid(iterations, noise)
    logits = torch.empty(0)
    for sigma, following in zip(grid, [*grid[1:], None], strict=True):
        levels = torch.full(tokens.shape, sigma, device=tokens.device)
        features = objective.features(layers, batch, z, levels)
        logits = objective.logits(features.flatten(0, 1), z.flatten(0, 1), levels.flatten())
        if following is not None:
            z = euler_step(z, (logits.softmax(-1) @ table).view_as(z), sigma, following)
    return _losses(logits, tokens)


def _losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each sequence [B], from logits [B L, V]."""
    log_probs = logits.log_softmax(-1).view(*tokens.shape, -1)
    return F.nll_loss(log_probs.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape).mean(1)
