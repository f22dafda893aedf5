"""Decoders from a folder whose blocks were trained alone: each block, all together, and each noise level.

A block sees no noise, so one pass gives its features for all levels. Without the analytic term they give a
plain next-token prediction. The mean of the blocks' features is the joint prediction, because the head is
linear; it is what `sample --chat` draws from.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.common import Draws, Part, Walks, headline, open_batches
from lowmem.inference.evaluation.tokens import levels_of
from lowmem.inference.frozen_run import FrozenRun
from lowmem.models.base import BlockModel
from lowmem.objectives.block_tokens import BlockTokens
from lowmem.objectives.next_tokens import IGNORED
from lowmem.schedule import mix_seed

Figures = defaultdict[tuple[str, int], list[Tensor]]  # (what, which) -> nats per label, of each row


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    _, objective = frozen.parts(BlockModel, BlockTokens)
    walks, figures, blocks = Walks(frozen, data), Figures(list), frozen.blocks
    levels = [(b, sigma) for b in blocks for sigma in levels_of(b, len(blocks), objective.noise)]
    row = objective.model.example_batch(1)["labels"].shape[1], objective.target_shape()[1]
    seed = mix_seed(frozen.plan.recipe.train.seed, "evaluate")
    draws = Draws(seed, row, walks.sizes, len(levels))
    for group, parts in enumerate(walks):
        means: list[Tensor | None] = [None] * len(parts)
        for block, layers in frozen.walk(blocks):
            seen = [objective.features(layers, part.batch) for part in parts]
            other = [objective.features(layers, part.shuffled("tokens")) for part in parts]
            for place, (part, features) in enumerate(zip(parts, seen, strict=True)):
                figures["alone", block].append(_losses(objective, part, features))
                share, before = features / len(blocks), means[place]
                means[place] = share if before is None else before + share
            for which, (owner, sigma) in enumerate(levels):
                if owner == block:
                    draws.go_to(group, which)
                    for part, features, shuffled in zip(parts, seen, other, strict=True):
                        z, level = _noised(objective, part, draws, sigma)
                        figures["true", which].append(_losses(objective, part, features, z, level))
                        figures["shuffled", which].append(_losses(objective, part, shuffled, z, level))
        for part, mean in zip(parts, means, strict=True):
            assert mean is not None
            figures["joint", 0].append(_losses(objective, part, mean))
    return _told(frozen, data, figures, levels)


def _losses(
    objective: BlockTokens, part: Part, features: Tensor, z: Tensor | None = None, level: Tensor | None = None
) -> Tensor:
    """Of each row, so that the mean over the rows of the whole test part is the mean over its labels."""
    losses = objective.token_losses(features, part.batch["labels"], z, level)
    return losses.sum(1) * part.batch["share"]


def _noised(objective: BlockTokens, part: Part, draws: Draws, sigma: float) -> tuple[Tensor, Tensor]:
    """z of the true labels at a level. Rows that are shorter use the beginning of what is drawn for them."""
    labels = part.batch["labels"]
    noise = draws.rows(len(part))[:, : labels.shape[1]].to(labels.device)
    return objective.embedded(labels) + sigma * noise, torch.full(labels.shape, sigma, device=labels.device)


def _told(
    frozen: FrozenRun, data: Dataset, figures: Figures, levels: list[tuple[int, float]]
) -> dict[str, Any]:
    rows, labels, share = 0, 0, 1.0
    for batch in open_batches(frozen, data):
        rows, share = rows + len(batch["labels"]), float(batch["share"][0])
        labels += int((batch["labels"] != IGNORED).sum())
    used = rows / labels / share  # 1 where the whole test part was used
    mean = {name: float(torch.cat(values).mean()) * used for name, values in figures.items()}
    joint = headline(torch.cat(figures["joint", 0]) * used)
    return {
        **joint,
        "num_labels": labels,
        "sigma_max_ce": joint["value"],
        "per_block": [{"block": block, "sigma_max_ce": mean["alone", block]} for block in frozen.blocks],
        "levels": [
            {"sigma": sigma, "block": block, "ce": mean["true", i], "ce_shuffled": mean["shuffled", i]}
            for i, (block, sigma) in enumerate(levels)
        ],
    }
