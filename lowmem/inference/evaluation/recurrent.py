"""Recurrent-depth language models: cross-entropy by number of iterations, at sigma_max as a plain prediction,
and generated text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.common import test_batches
from lowmem.inference.evaluation.tokens import headline, nll
from lowmem.inference.frozen_run import FrozenRun
from lowmem.inference.sampling import _next_logits, draw_token
from lowmem.models.base import Batch
from lowmem.models.recurrent_lm import RecurrentLm
from lowmem.noise import euler_step, sampler_grid
from lowmem.objectives.base import mean_cosine
from lowmem.objectives.recurrent import RecurrentDenoising
from lowmem.schedule import mix_seed

ITERATIONS = (1, 2, 4, 8, 16, 32)


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    """`value`: at sigma_max in one pass (denoiser), or after the mean number of iterations (end to end)."""
    model, objective, recipe = frozen.model, frozen.model.objective, frozen.plan.recipe
    assert isinstance(model, RecurrentLm) and isinstance(objective, RecurrentDenoising)
    torch.manual_seed(mix_seed(recipe.train.seed, "evaluate"))
    batches = test_batches(frozen, data)
    by_iterations = []
    if recipe.method == "end_to_end":
        by_iterations = [
            {"iterations": count, "ce": float(_loop(frozen, batches, count).mean())} for count in ITERATIONS
        ]
        return {
            **headline(_loop(frozen, batches, objective.config.iterations)),
            "per_block": [],
            "iterations": by_iterations,
        }
    with frozen.on_device(range(frozen.plan.settings.num_blocks)) as layers:
        for count in ITERATIONS:
            parts = [_chain(frozen, layers, batch, count) for batch in batches]
            by_iterations.append({"iterations": count, "ce": float(torch.cat(parts).mean())})
        losses = torch.cat([_chain(frozen, layers, batch, 1) for batch in batches])
    figures = headline(losses)
    per_block = [{"block": 0, "sigma_max_ce": figures["value"]}]
    cosine = mean_cosine(model.target_table())
    return {
        **figures,
        "sigma_max_ce": figures["value"],
        "per_block": per_block,
        "iterations": by_iterations,
        "table_cosine": cosine,
    }


@torch.no_grad()
def generate(
    frozen: FrozenRun, prompt: Tensor, num_tokens: int, temperature: float, top_p: float, seed: int
) -> Tensor:
    """Continues `prompt` [B, L] (L may be 0) by `num_tokens` tokens: [B, L + num_tokens], each drawn from a
    prediction of its own.

    A prediction is one pass at sigma_max, or the whole loop with the mean number of iterations, over the last
    tokens: no more than the model was trained on. There is no cache, for the state of each position is made
    anew.
    """
    model = frozen.model
    assert isinstance(model, RecurrentLm)
    torch.manual_seed(mix_seed(seed, "states"))
    generator = torch.Generator().manual_seed(mix_seed(seed, "generate"))
    tokens = prompt
    for _ in range(num_tokens):
        window = tokens[:, max(tokens.shape[1] + 1 - model.seq_len, 0) :]
        logits = _next_logits(frozen, window)
        tokens = torch.cat([tokens, draw_token(logits / max(temperature, 1e-6), top_p, generator)], dim=1)
    return tokens


def _loop(frozen: FrozenRun, batches: list[Batch], iterations: int) -> Tensor:
    """Cross-entropy [B] after so many iterations."""
    model, objective = frozen.model, frozen.model.objective
    assert isinstance(model, RecurrentLm) and isinstance(objective, RecurrentDenoising)
    return frozen.whole(
        batches,
        lambda batch: objective.entered(model, batch["tokens"], iterations),
        lambda batch, h, entered: _losses(
            objective.logits(model, model.features(h, entered.cond).flatten(0, 1), None, None),
            batch["tokens"],
        ),
    )


def _chain(frozen: FrozenRun, layers: Iterable[nn.Module], batch: Batch, iterations: int) -> Tensor:
    """Cross-entropy [B] of the last call of a chain of so many denoising iterations.

    One iteration: a plain prediction at sigma_max.
    """
    model, objective, noise = frozen.model, frozen.model.objective, frozen.plan.noise
    assert isinstance(model, RecurrentLm) and isinstance(objective, RecurrentDenoising)
    tokens, table = batch["tokens"], model.target_table()
    z = torch.randn(*tokens.shape, table.shape[1], device=tokens.device) * math.sqrt(1 + noise.sigma_max**2)
    grid = sampler_grid(iterations, noise)
    logits = torch.empty(0)
    for sigma, following in zip(grid, [*grid[1:], None], strict=True):
        levels = torch.full(tokens.shape, sigma, device=tokens.device)
        features = objective.features(model, layers, batch, z, levels, noise)
        logits = objective.logits(model, features.flatten(0, 1), z.flatten(0, 1), levels.flatten())
        if following is not None:
            z = euler_step(z, (logits.softmax(-1) @ table).view_as(z), sigma, following)
    return _losses(logits, tokens)


def _losses(logits: Tensor, tokens: Tensor) -> Tensor:
    return nll(logits.log_softmax(-1).view(*tokens.shape, -1), tokens).mean(1)
