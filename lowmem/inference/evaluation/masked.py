"""Masked-diffusion language models: a bound on the bits per token, block by block, and a cross-entropy per
level.

Each block is scored on its own interval of t, not widened, so that the parts add up to one NELBO of the test
windows. A model trained end to end is scored on the same intervals, through all its layers. Draws depend on
no seed of the run: all runs meet the same masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.common import parts_of, test_batches
from lowmem.inference.frozen_run import FrozenRun
from lowmem.models.base import BlockModel
from lowmem.noise import Interval
from lowmem.objectives.base import Batch
from lowmem.objectives.masked import MaskedDenoising
from lowmem.planning.evaluation import NUM_DRAWS
from lowmem.schedule import mix_seed

LOWEST_SHARE = 0.02  # of tokens masked, at the lowest of the levels reported


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    _, objective = frozen.parts(BlockModel, MaskedDenoising)
    num_blocks, batches = len(frozen.blocks), test_batches(frozen, data)
    total: Tensor | float = 0.0
    per_block, levels = [], []
    for block, layers in frozen.walk_owners(frozen.blocks):
        interval = objective.interval(block, num_blocks)
        draws = []  # of the NELBO: a row for each draw, a column for each window
        for draw in range(NUM_DRAWS):
            torch.manual_seed(mix_seed("evaluate", block, draw))
            draws.append(torch.cat([_interval_loss(frozen, layers, batch, interval) for batch in batches]))
        part = torch.stack(draws).mean(0) / math.log(2)
        total = total + part
        bits = float(part.mean())
        figures = {"bits": bits, "bits_std_error": _std_error(part), "loss": bits * math.log(2)}
        per_block.append({"block": block, "t_low": interval.low, "t_high": interval.high, **figures})
        for alpha in _alphas(block, num_blocks):
            t = objective.alpha_inverse(alpha)
            ce, shuffled = _cross_entropy(frozen, layers, batches, t)
            levels.append(
                {"t": t, "masked_share": 1 - alpha, "block": block, "ce": ce, "ce_shuffled": shuffled}
            )
    assert isinstance(total, Tensor)
    unit = getattr(frozen.plan.recipe.data, "metric_unit", "token")
    return {
        "metric": f"bits_per_{unit}",
        "value": float(total.mean()),
        "value_std_error": _std_error(total),
        "num_windows": len(total),
        "per_block": per_block,
        "levels": levels,
    }


def _interval_loss(
    frozen: FrozenRun, layers: Iterable[nn.Module], batch: Batch, interval: Interval
) -> Tensor:
    """[B]: `block_loss` without its gradients: drawn for the whole batch, computed part by part."""
    _, objective = frozen.parts(BlockModel, MaskedDenoising)
    kept = objective.drawn(batch["tokens"], interval)
    losses = _losses(frozen, layers, batch["tokens"], kept.mask, kept.t, batch)
    return kept.length * objective.weighted_mean(losses, kept.mask, kept.t)


def _losses(
    frozen: FrozenRun, layers: Iterable[nn.Module], context: Tensor, mask: Tensor, t: Tensor, batch: Batch
) -> Tensor:
    """Cross-entropy of each token [B, L] from the unmasked ones of `context` [B, L], part by part."""
    _, objective = frozen.parts(BlockModel, MaskedDenoising)
    found = []
    for part in parts_of(frozen, batch):
        rows = slice(part.start, part.stop)
        found.append(objective.losses(layers, context[rows], mask[rows], t[rows], part.batch["tokens"]))
    return torch.cat(found)


def _alphas(block: int, num_blocks: int) -> list[float]:
    """The levels that a block is looked at: the middle of its interval, and both ends of the whole range."""
    top, bottom = [0.0] if block == 0 else [], [1 - LOWEST_SHARE] if block == num_blocks - 1 else []
    return [*top, (block + 0.5) / num_blocks, *bottom]


def _cross_entropy(
    frozen: FrozenRun, layers: Iterable[nn.Module], batches: list[Batch], t: float
) -> tuple[float, float]:
    """Mean over masked tokens in nats: with the true unmasked tokens around them, and with another's."""
    _, objective = frozen.parts(BlockModel, MaskedDenoising)
    sums, count = [0.0, 0.0], 0.0
    torch.manual_seed(mix_seed("levels", t))
    for batch in batches:
        tokens = batch["tokens"]
        levels = torch.full((len(tokens),), t, device=tokens.device)
        mask = torch.rand(tokens.shape, device=tokens.device) < objective.masked_share(levels)[:, None]
        for place, context in enumerate((tokens, tokens.roll(1, 0))):
            losses = _losses(frozen, layers, context, mask, levels, batch)
            sums[place] += float((losses * mask).sum())
        count += float(mask.sum())
    return sums[0] / max(count, 1), sums[1] / max(count, 1)


def _std_error(values: Tensor) -> float | None:
    """Standard error of the mean over windows; it counts the draws of t and masks too."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
