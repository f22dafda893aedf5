"""Classifiers: the chain, the joint prediction, each block alone, and a cross-entropy per noise level.

A cross-entropy averaged over levels says nothing for a discrete target, because at low sigma the label can be
read off z. So each level stands alone, with the true image and with another sample's: their gap is what the
block takes from its input. At sigma_max it is a plain prediction, comparable with an ordinary model's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.common import test_batches
from lowmem.inference.frozen_run import FrozenRun, initial_noise
from lowmem.models.base import BlockModel
from lowmem.noise import block_of, boundaries, euler_step, sigma_at
from lowmem.objectives.base import Batch, mean_cosine
from lowmem.objectives.labels import LabelDenoising
from lowmem.recipe import NoiseConfig
from lowmem.schedule import mix_seed


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    plan = frozen.plan
    if plan.recipe.method == "end_to_end":
        return classify_end_to_end(frozen, data)
    num_steps = len(frozen.blocks) if plan.recipe.eval.num_steps == "auto" else plan.recipe.eval.num_steps
    return classify_blocks(frozen, data, num_steps)


def classify_end_to_end(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    batches = test_batches(frozen, data)
    logits = frozen.whole(
        batches,
        frozen.objective.enter,
        lambda _, h, entered: frozen.model.output_part(h, entered.cond).float(),
    )
    labels = torch.cat([batch["label"] for batch in batches])
    figures = {"metric": "accuracy", "value": _accuracy(logits, labels)}
    return {**figures, "cross_entropy": _cross_entropy(logits, labels), "per_block": []}


def classify_blocks(frozen: FrozenRun, data: Dataset, num_steps: int) -> dict[str, Any]:
    """All figures of a classifier in blocks, in one pass over them; the chain takes `num_steps` steps."""
    _, objective = frozen.parts(BlockModel, LabelDenoising)
    noise, num_blocks, config = objective.noise, len(frozen.blocks), frozen.plan.recipe.eval
    batches = test_batches(frozen, data)
    labels = torch.cat([batch["label"] for batch in batches])
    table = objective.model.target_table()

    torch.manual_seed(mix_seed(frozen.plan.recipe.train.seed, "evaluate"))
    at_top = [
        initial_noise((len(b["label"]), table.shape[1]), noise.sigma_max).to(frozen.device) for b in batches
    ]
    chain, schedule = _Chain(frozen, batches, at_top), dict(frozen.schedule(num_steps))
    levels_of: dict[int, list[float]] = defaultdict(list)
    borders = boundaries(num_blocks, noise)
    for level in _levels(num_blocks, noise):
        levels_of[block_of(level, borders)].append(level)

    per_block, levels = [], []
    log_probs = torch.zeros(len(labels), table.shape[0], device=frozen.device)
    for block, layers in frozen.walk(frozen.blocks):
        # the paper's sampler: this block's share of the way down from sigma_max
        for sigma, following in schedule.get(block, []):
            chain.step(block, layers, sigma, following)
        # this block as a plain predictor from pure noise
        pairs = zip(batches, at_top, strict=True)
        alone = torch.cat([objective.logits(layers, b, z, _full(noise.sigma_max, z)) for b, z in pairs])
        log_probs += alone.log_softmax(-1) / num_blocks
        figures = {
            "sigma_max_accuracy": _accuracy(alone, labels),
            "sigma_max_ce": _cross_entropy(alone, labels),
        }
        per_block.append({"block": block, **figures})
        # its own levels, on the true z: with the true image and with another one
        for sigma in levels_of[block]:
            levels.append({"sigma": sigma, "block": block, **_oracle(frozen, layers, batches, sigma)})
    last, joint = _accuracy(torch.cat(chain.logits), labels), _accuracy(log_probs, labels)
    return {
        "metric": "accuracy",
        "value": joint if config.prediction == "joint" else last,
        "prediction": config.prediction,
        "num_steps": num_steps,
        "chain_accuracy": last,
        "joint_accuracy": joint,
        "sigma_max_ce": _cross_entropy(log_probs, labels),
        "per_block": per_block,
        "levels": levels,
        "chain": chain.calls,  # on its own z, beside the oracle's at the same level
        "table_cosine": mean_cosine(table),
    }


class _Chain:
    """The paper's sampler on its own z, with the figures of each call beside the oracle's."""

    def __init__(self, frozen: FrozenRun, batches: list[Batch], at_top: list[Tensor]) -> None:
        self._frozen, self._batches, self._z = frozen, batches, list(at_top)
        guidance = frozen.plan.recipe.eval.guidance
        self._guidance = 1.0 if guidance == "auto" else guidance
        self.logits: list[Tensor] = at_top
        self.calls: list[dict[str, float]] = []

    def step(self, block: int, layers: Iterable[nn.Module], sigma: float, following: float | None) -> None:
        _, objective = self._frozen.parts(BlockModel, LabelDenoising)
        labels = torch.cat([batch["label"] for batch in self._batches])
        self.logits, shuffled = (
            [
                objective.guided_logits(layers, seen(b), z, _full(sigma, z), self._guidance)
                for b, z in zip(self._batches, self._z, strict=True)
            ]
            for seen in (dict, _shuffled)
        )
        denoised = [objective.denoised(out) for out in self.logits]
        oracle = _oracle(self._frozen, layers, self._batches, sigma)
        self.calls.append(
            {
                "sigma": sigma,
                "block": block,
                "ce": _cross_entropy(torch.cat(self.logits), labels),
                "ce_shuffled": _cross_entropy(torch.cat(shuffled), labels),
                "cosine": _cosine(torch.cat(denoised), objective.model.target_table()[labels]),
                "oracle_ce": oracle["ce"],
                "oracle_cosine": oracle["cosine"],
            }
        )
        if following is not None:
            pairs = zip(self._z, denoised, strict=True)
            self._z = [euler_step(z, estimate, sigma, following) for z, estimate in pairs]


def _oracle(
    frozen: FrozenRun, layers: Iterable[nn.Module], batches: list[Batch], sigma: float
) -> dict[str, float]:
    """One level on z made from the true label: with the sample's own image, and with its neighbour's."""
    _, objective = frozen.parts(BlockModel, LabelDenoising)
    table = objective.model.target_table()
    out: list[list[Tensor]] = [[], []]
    for batch in batches:
        z = objective.noised(
            table[batch["label"]], torch.full_like(batch["label"], 1, dtype=torch.float32) * sigma
        )
        for place, context in enumerate((batch, _shuffled(batch))):
            out[place].append(objective.logits(layers, context, z, _full(sigma, z)))
    labels = torch.cat([batch["label"] for batch in batches])
    true, shuffled = (torch.cat(logits) for logits in out)
    cosine = _cosine(objective.denoised(true), table[labels])
    return {
        "ce": _cross_entropy(true, labels),
        "ce_shuffled": _cross_entropy(shuffled, labels),
        "cosine": cosine,
    }


def _shuffled(batch: Batch) -> Batch:
    """Every sample with another one's image."""
    return {**batch, "image": batch["image"].roll(1, 0)}


def _cosine(denoised: Tensor, y: Tensor) -> float:
    """Mean cosine of the denoised estimate with the true label's embedding."""
    return float(F.cosine_similarity(denoised, y, dim=-1).mean())


def _levels(num_blocks: int, noise: NoiseConfig) -> list[float]:
    """sigma_max, the middle of each block's interval by probability, sigma_min."""
    middles = [sigma_at(1 - (b + 0.5) / num_blocks, noise) for b in range(num_blocks)]
    return [noise.sigma_max, *middles, noise.sigma_min]


def _full(sigma: float, z: Tensor) -> Tensor:
    return torch.full((len(z),), sigma, device=z.device)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).float().mean())


def _cross_entropy(logits: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(logits, labels))
