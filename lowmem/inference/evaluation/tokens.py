"""Autoregressive language models: each block and the joint prediction at sigma_max, and a cross-entropy per
level.

At sigma_max the noisy token says nothing, so a block's cross-entropy is a plain next-token prediction,
comparable with an ordinary model's. The joint prediction averages the log-probabilities of all blocks there
(renormalised): one pass over as many layers as the ordinary model has, with a perplexity, temperature and
top-p.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.common import headline, test_batches
from lowmem.inference.frozen_run import FrozenRun, initial_noise
from lowmem.models.base import BlockModel
from lowmem.noise import euler_step, sigma_at
from lowmem.objectives.base import Batch, mean_cosine
from lowmem.objectives.tokens import HEALTH_ROWS, TokenDenoising
from lowmem.recipe import NoiseConfig
from lowmem.schedule import mix_seed


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    batches, recipe = test_batches(frozen, data), frozen.plan.recipe
    if recipe.method == "end_to_end":
        return {**headline(frozen.losses(batches)), "per_block": []}
    num_steps = len(frozen.blocks) if recipe.eval.num_steps == "auto" else recipe.eval.num_steps
    return evaluate_blocks(frozen, batches, num_steps)


def evaluate_blocks(frozen: FrozenRun, batches: list[Batch], num_steps: int) -> dict[str, Any]:
    """All figures of a model in blocks, in one pass over the blocks; the chain takes `num_steps` steps."""
    _, objective = frozen.parts(BlockModel, TokenDenoising)
    noise, num_blocks = objective.noise, len(frozen.blocks)
    schedule, table = dict(frozen.schedule(num_steps)), objective.model.target_table()
    torch.manual_seed(mix_seed(frozen.plan.recipe.train.seed, "evaluate"))
    shapes = [(*batch["tokens"].shape, table.shape[1]) for batch in batches]
    top_noise = [initial_noise(shape, noise.sigma_max).to(frozen.device) for shape in shapes]
    top_levels = [_full(batch, noise.sigma_max) for batch in batches]
    mean_features, chain = [torch.zeros_like(z) for z in top_noise], _Chain(frozen, batches, top_noise)
    per_block, levels = [], []
    for block, layers in frozen.walk(frozen.blocks):
        # a plain predictor from pure noise
        alone = []
        for total, batch, z, level in zip(mean_features, batches, top_noise, top_levels, strict=True):
            features = objective.features(layers, batch, z, level)
            alone.append(objective.predictions(features, batch["tokens"], z, level)[0].mean(1))
            total += features / num_blocks
        per_block.append({"block": block, "sigma_max_ce": float(torch.cat(alone).mean())})
        # the paper's sampler, given the true clean context: this block's share of the way down
        for sigma, following in schedule.get(block, []):
            chain.step(block, layers, sigma, following)
        for sigma in _levels(block, num_blocks, noise):
            levels.append({"sigma": sigma, "block": block, **_oracle(frozen, layers, batches, sigma)})
    # The head is linear: the mean of the blocks' features gives the mean of their logits, and that is the
    # mean of their log-probabilities once renormalised.
    joint = [
        objective.predictions(features.to(frozen.dtype), batch["tokens"], z, level)[0].mean(1)
        for features, batch, z, level in zip(mean_features, batches, top_noise, top_levels, strict=True)
    ]
    figures = headline(torch.cat(joint))
    return {
        **figures,
        "sigma_max_ce": figures["value"],
        "per_block": per_block,
        "levels": levels,
        "num_steps": num_steps,
        "chain": chain.calls,
        "table_cosine": mean_cosine(table[:HEALTH_ROWS]),
    }


def _levels(block: int, num_blocks: int, noise: NoiseConfig) -> list[float]:
    """The middle of the block's interval by probability; for the first block sigma_max too, for the last
    sigma_min.
    """
    top = [noise.sigma_max] if block == 0 else []
    bottom = [noise.sigma_min] if block == num_blocks - 1 else []
    return [*top, sigma_at(1 - (block + 0.5) / num_blocks, noise), *bottom]


class _Chain:
    """The paper's sampler on its own z, with the figures of each call beside the oracle's z at the same
    level.
    """

    def __init__(self, frozen: FrozenRun, batches: list[Batch], top_noise: list[Tensor]) -> None:
        self._frozen, self._batches, self._z = frozen, batches, top_noise
        self.calls: list[dict[str, float]] = []

    def step(self, block: int, layers: Iterable[nn.Module], sigma: float, following: float | None) -> None:
        frozen, batches = self._frozen, self._batches
        own, shuffled = (_call(frozen, layers, batches, self._z, sigma, shuffle) for shuffle in (False, True))
        oracle = _call(frozen, layers, batches, _true_z(frozen, batches, sigma), sigma)
        figures = {"ce": own.ce, "ce_shuffled": shuffled.ce, "cosine": own.cosine}
        figures |= {"oracle_ce": oracle.ce, "oracle_cosine": oracle.cosine}
        self.calls.append({"sigma": sigma, "block": block, **figures})
        if following is not None:
            pairs = zip(self._z, own.denoised, strict=True)
            self._z = [euler_step(z, denoised, sigma, following) for z, denoised in pairs]


class _Call(NamedTuple):
    """One call of a block on all test batches."""

    ce: float
    cosine: float  # of the denoised estimate with the true token's embedding
    denoised: list[Tensor]


def _call(
    frozen: FrozenRun,
    layers: Iterable[nn.Module],
    batches: list[Batch],
    noisy: list[Tensor],
    sigma: float,
    shuffle: bool = False,
) -> _Call:
    """`shuffle`: every sequence is given another one's clean context."""
    _, objective = frozen.parts(BlockModel, TokenDenoising)
    table = objective.model.target_table()
    losses, cosines, estimates = [], [], []
    for batch, z in zip(batches, noisy, strict=True):
        tokens, level = batch["tokens"], _full(batch, sigma)
        context = {"tokens": tokens.roll(1, 0)} if shuffle else batch
        features = objective.features(layers, context, z, level)
        loss, denoised = objective.predictions(features, tokens, z, level)
        losses.append(loss.mean(1))
        cosines.append(F.cosine_similarity(denoised, F.embedding(tokens, table), dim=-1).mean(1))
        estimates.append(denoised)
    return _Call(float(torch.cat(losses).mean()), float(torch.cat(cosines).mean()), estimates)


def _oracle(
    frozen: FrozenRun, layers: Iterable[nn.Module], batches: list[Batch], sigma: float
) -> dict[str, float]:
    """On z made from the true tokens: with the true clean context, and with another sequence's."""
    z = _true_z(frozen, batches, sigma)
    true, shuffled = (_call(frozen, layers, batches, z, sigma, shuffle) for shuffle in (False, True))
    return {"ce": true.ce, "ce_shuffled": shuffled.ce, "cosine": true.cosine}


def _true_z(frozen: FrozenRun, batches: list[Batch], sigma: float) -> list[Tensor]:
    _, objective = frozen.parts(BlockModel, TokenDenoising)
    y = [F.embedding(batch["tokens"], objective.model.target_table()) for batch in batches]
    return [clean + sigma * torch.randn_like(clean) for clean in y]


def _full(batch: Batch, sigma: float) -> Tensor:
    return torch.full(batch["tokens"].shape, sigma, device=batch["tokens"].device)
