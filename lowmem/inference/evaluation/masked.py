"""Masked-diffusion language models: a bound on the bits per token, block by block, a cross-entropy per level,
and generated text.

Each block is scored on its own interval of t, not widened, so that their parts add up to one NELBO of the
test windows. A model trained end to end is scored on the same intervals, through all its layers. Draws depend
on no seed of the run: all runs meet the same masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.data.config import StdlibTextData, TokenisedText
from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.common import test_batches
from lowmem.inference.frozen_run import FrozenRun
from lowmem.models.base import Batch
from lowmem.models.masked_lm import MaskedLm
from lowmem.objectives.masked import MaskedDenoising
from lowmem.recipe import Recipe
from lowmem.schedule import mix_seed

NUM_DRAWS = 4  # of t and masks for each test window and block
LOWEST_SHARE = 0.02  # of tokens masked, at the lowest of the levels reported


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    model, objective = _parts(frozen)
    recipe, num_blocks = frozen.plan.recipe, frozen.plan.settings.num_blocks
    batches = test_batches(frozen, data)
    total: Tensor | float = 0.0
    per_block, levels = [], []
    for block, layers in _walk(frozen):
        interval = objective.interval(block, num_blocks, frozen.plan.noise, gamma=0.0)
        parts = []  # of the NELBO, a row for each draw, a column for each window
        for draw in range(NUM_DRAWS):
            torch.manual_seed(mix_seed("evaluate", block, draw))
            parts.append(
                torch.cat(
                    [
                        objective.block_loss(model, layers, batch, interval, frozen.plan.noise, False)
                        for batch in batches
                    ]
                )
            )
        part = torch.stack(parts).mean(0) / math.log(2)
        total = total + part
        figures = {
            "bits": float(part.mean()),
            "bits_std_error": _std_error(part),
            "loss": float(part.mean()) * math.log(2),
        }
        per_block.append({"block": block, "t_low": interval.low, "t_high": interval.high, **figures})
        for alpha in _alphas(block, num_blocks):
            ce, shuffled = _cross_entropy(frozen, layers, batches, objective.alpha_inverse(alpha))
            levels.append(
                {
                    "t": objective.alpha_inverse(alpha),
                    "masked_share": 1 - alpha,
                    "block": block,
                    "ce": ce,
                    "ce_shuffled": shuffled,
                }
            )
    assert isinstance(total, Tensor)
    return {
        "metric": _metric(recipe),
        "value": float(total.mean()),
        "value_std_error": _std_error(total),
        "num_windows": len(total),
        "per_block": per_block,
        "levels": levels,
    }


def _walk(frozen: FrozenRun) -> Iterator[tuple[int, Iterable[nn.Module]]]:
    """The layers that own each block's interval: the block's own, or all of them in a model trained end to
    end.
    """
    blocks = range(frozen.plan.settings.num_blocks)
    if frozen.plan.recipe.method == "diffusion_blocks":
        yield from frozen.walk(blocks)
        return
    with frozen.on_device(blocks) as layers:
        for block in blocks:
            yield block, layers


def _alphas(block: int, num_blocks: int) -> list[float]:
    """The levels at which a block is looked at: the middle of its interval, and both ends of the whole range."""
    top, bottom = [0.0] if block == 0 else [], [1 - LOWEST_SHARE] if block == num_blocks - 1 else []
    return [*top, (block + 0.5) / num_blocks, *bottom]


def _cross_entropy(
    frozen: FrozenRun, layers: Iterable[nn.Module], batches: list[Batch], t: float
) -> tuple[float, float]:
    """Mean over masked tokens, in nats, with the true unmasked tokens around them, and with another window's."""
    model, objective = _parts(frozen)
    sums, count = [0.0, 0.0], 0.0
    torch.manual_seed(mix_seed("levels", t))
    for batch in batches:
        tokens = batch["tokens"]
        levels = torch.full((len(tokens),), t, device=tokens.device)
        mask = torch.rand(tokens.shape, device=tokens.device) < objective.masked_share(levels)[:, None]
        for place, context in enumerate((tokens, tokens.roll(1, 0))):
            sums[place] += float(
                (objective.losses(model, layers, context, mask, levels, tokens) * mask).sum()
            )
        count += float(mask.sum())
    return sums[0] / max(count, 1), sums[1] / max(count, 1)


def _metric(recipe: Recipe) -> str:
    """A token is a character (or a byte of it) only where the tokenizer says so."""
    data = recipe.data
    single = isinstance(data, StdlibTextData) or (
        isinstance(data, TokenisedText) and data.tokenizer in ("bytes", "characters")
    )
    return "bits_per_char" if single else "bits_per_token"


def _std_error(values: Tensor) -> float | None:
    """Of the mean over windows; it counts the draws of t and masks too."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


def _parts(frozen: FrozenRun) -> tuple[MaskedLm, MaskedDenoising]:
    model, objective = frozen.model, frozen.model.objective
    assert isinstance(model, MaskedLm) and isinstance(objective, MaskedDenoising)
    return model, objective
