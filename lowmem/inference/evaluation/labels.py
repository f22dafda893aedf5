"""Classifiers: the chain, the joint prediction, each block alone, and a cross-entropy per noise level.

A cross-entropy averaged over levels says nothing for a discrete target, because at low sigma the label can be
read off z. So each level stands alone, with the true image and with another sample's: their gap is what the
block takes from its input. At sigma_max it is a plain prediction, comparable with an ordinary model's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.common import Draws, Part, Walks, test_parts
from lowmem.inference.frozen_run import FrozenRun
from lowmem.models.base import BlockModel
from lowmem.noise import append_dims, block_of, boundaries, euler_step, sigma_at
from lowmem.objectives.base import Batch, mean_cosine
from lowmem.objectives.labels import LabelDenoising
from lowmem.recipe import NoiseConfig
from lowmem.schedule import mix_seed

Figures = defaultdict[tuple[str, int, str], list[Tensor]]  # (what, which, figure) -> a value per sample
CROSS_ENTROPIES = ("ce", "ce_shuffled", "oracle_ce")


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    plan = frozen.plan
    if plan.recipe.whole:
        return classify_end_to_end(frozen, data)
    num_steps = len(frozen.blocks) if plan.recipe.eval.num_steps == "auto" else plan.recipe.eval.num_steps
    return classify_blocks(frozen, data, num_steps)


def classify_end_to_end(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    parts = test_parts(frozen, data)
    logits = frozen.whole(
        [part.batch for part in parts],
        frozen.objective.enter,
        lambda _, h, entered: frozen.model.output_part(h, entered.cond).float(),
    )
    labels = torch.cat([part.batch["label"] for part in parts])
    accuracy = float((logits.argmax(-1) == labels).float().mean())
    figures = {"metric": "accuracy", "value": accuracy}
    return {**figures, "cross_entropy": float(F.cross_entropy(logits, labels)), "per_block": []}


def classify_blocks(frozen: FrozenRun, data: Dataset, num_steps: int) -> dict[str, Any]:
    """All figures of a classifier in blocks; the chain takes `num_steps` steps."""
    _, objective = frozen.parts(BlockModel, LabelDenoising)
    walks, config = _Walks(frozen, data, num_steps), frozen.plan.recipe.eval
    for number, parts in enumerate(walks.groups):
        walks.walk(number, parts)
    figures = {
        name: _cross_entropy(torch.cat(values))
        if name[2] in CROSS_ENTROPIES
        else float(torch.cat(values).mean())
        for name, values in walks.figures.items()
    }
    last = figures["chain", len(walks.calls) - 1, "accuracy"]
    joint = figures["joint", 0, "accuracy"]

    def row(what: str, which: int, *names: str) -> dict[str, float]:
        return {name: figures[what, which, name] for name in names}

    of_level = "ce", "ce_shuffled", "cosine"
    return {
        "metric": "accuracy",
        "value": joint if config.prediction == "joint" else last,
        "prediction": config.prediction,
        "num_steps": num_steps,
        "chain_accuracy": last,
        "joint_accuracy": joint,
        "sigma_max_ce": figures["joint", 0, "ce"],
        "per_block": [
            {
                "block": block,
                "sigma_max_accuracy": figures["alone", block, "accuracy"],
                "sigma_max_ce": figures["alone", block, "ce"],
            }
            for block in frozen.blocks
        ],
        "levels": [
            {"sigma": sigma, "block": block, **row("level", i, *of_level)}
            for i, (block, sigma) in enumerate(walks.levels)
        ],
        "chain": [  # on its own z, beside the oracle's at the same level
            {"sigma": sigma, "block": block, **row("chain", i, *of_level, "oracle_ce", "oracle_cosine")}
            for i, (block, sigma, _) in enumerate(walks.calls)
        ],
        "table_cosine": mean_cosine(objective.model.target_table()),
    }


class _Walks:
    """Groups of the test part pass the blocks; every group leaves its figures of each sample.

    A cross-entropy is kept as the log-probability of the true label.
    """

    def __init__(self, frozen: FrozenRun, data: Dataset, num_steps: int) -> None:
        _, self._objective = frozen.parts(BlockModel, LabelDenoising)
        self._frozen, self._noise, num_blocks = frozen, self._objective.noise, len(frozen.blocks)
        self.groups, self.figures = Walks(frozen, data), Figures(list)
        self.calls = [(b, *call) for b, calls in frozen.schedule(num_steps) for call in calls]
        borders = boundaries(num_blocks, self._noise)
        levels = [(block_of(sigma, borders), sigma) for sigma in _levels(num_blocks, self._noise)]
        self.levels = sorted(levels, key=lambda level: level[0])
        guidance = frozen.plan.recipe.eval.guidance
        self._guidance = 1.0 if guidance == "auto" else guidance
        seed = mix_seed(frozen.plan.recipe.train.seed, "evaluate")
        row, num_sites = [self._objective.target_shape()[1]], 1 + len(self.calls) + len(self.levels)
        self._draws = Draws(seed, row, self.groups.sizes, num_sites)

    def walk(self, group: int, parts: list[Part]) -> None:
        objective, device, sigma_max = self._objective, self._frozen.device, self._noise.sigma_max
        num_blocks, (num_classes, _) = len(self._frozen.blocks), objective.target_shape()
        self._draws.go_to(group, 0)
        scale = math.sqrt(1 + sigma_max**2)
        top = [(self._draws.rows(len(part)) * scale).to(device) for part in parts]
        log_probs = [torch.zeros(len(part), num_classes, device=device) for part in parts]
        z, site = [each.clone() for each in top], 0  # it keeps its memory, as in `tokens`
        for block, layers in self._frozen.walk(self._frozen.blocks):
            # the paper's sampler: this block's share of the way down from sigma_max
            for i, (owner, sigma, following) in enumerate(self.calls):
                if owner == block:
                    self._draws.go_to(group, site := site + 1)
                    for place, part in enumerate(parts):
                        z[place].copy_(self._chain(i, layers, part, z[place], sigma, following))
            # this block as a plain predictor from pure noise
            for part, noise, total in zip(parts, top, log_probs, strict=True):
                alone = objective.logits(layers, part.batch, noise, _full(sigma_max, noise))
                self._scored("alone", block, part, alone)
                total += alone.log_softmax(-1) / num_blocks
            # its own levels, on the true z: with the true image and with another one
            for i, (owner, sigma) in enumerate(self.levels):
                if owner == block:
                    self._draws.go_to(group, site := site + 1)
                    for part in parts:
                        self._keep("level", i, self._oracle(layers, part, sigma))
        for part, total in zip(parts, log_probs, strict=True):
            self._scored("joint", 0, part, total)

    def _scored(self, what: str, which: int, part: Part, logits: Tensor) -> None:
        labels = part.batch["label"]
        right = (logits.argmax(-1) == labels).float()
        self._keep(what, which, {"accuracy": right, "ce": _log_prob(logits, labels)})

    def _chain(
        self,
        which: int,
        layers: Iterable[nn.Module],
        part: Part,
        z: Tensor,
        sigma: float,
        following: float | None,
    ) -> Tensor:
        """A call on the chain's own z, beside one on the oracle's z at the same level. Returns the next z."""
        objective, level, labels = self._objective, _full(sigma, z), part.batch["label"]
        own, other = (
            objective.guided_logits(layers, seen, z, level, self._guidance)
            for seen in (part.batch, part.shuffled(*_inputs(part.batch)))
        )
        oracle = {f"oracle_{name}": value for name, value in self._oracle(layers, part, sigma).items()}
        denoised = objective.denoised(own)
        self._scored("chain", which, part, own)
        figures = {"ce_shuffled": _log_prob(other, labels), "cosine": self._cosine(denoised, labels)}
        self._keep("chain", which, {**figures, **oracle})
        return z if following is None else euler_step(z, denoised, sigma, following)

    def _oracle(self, layers: Iterable[nn.Module], part: Part, sigma: float) -> dict[str, Tensor]:
        """One level on z made from the true label: with the sample's own image, and with its neighbour's."""
        objective, labels = self._objective, part.batch["label"]
        y = objective.model.target_table()[labels]
        levels = torch.full_like(labels, 1, dtype=torch.float32) * sigma
        z = y + append_dims(levels, y.ndim) * self._draws.rows(len(part)).to(y.device)
        true, other = (
            objective.logits(layers, seen, z, _full(sigma, z))
            for seen in (part.batch, part.shuffled(*_inputs(part.batch)))
        )
        cosine = self._cosine(objective.denoised(true), labels)
        return {"ce": _log_prob(true, labels), "ce_shuffled": _log_prob(other, labels), "cosine": cosine}

    def _cosine(self, denoised: Tensor, labels: Tensor) -> Tensor:
        """[B]: cosine of the denoised estimate with the true label's embedding."""
        return F.cosine_similarity(denoised, self._objective.model.target_table()[labels], dim=-1)

    def _keep(self, what: str, which: int, found: dict[str, Tensor]) -> None:
        for name, value in found.items():
            self.figures[what, which, name].append(value)


def _levels(num_blocks: int, noise: NoiseConfig) -> list[float]:
    """sigma_max, the middle of each block's interval by probability, sigma_min."""
    middles = [sigma_at(1 - (b + 0.5) / num_blocks, noise) for b in range(num_blocks)]
    return [noise.sigma_max, *middles, noise.sigma_min]


def _full(sigma: float, z: Tensor) -> Tensor:
    return torch.full((len(z),), sigma, device=z.device)


def _log_prob(logits: Tensor, labels: Tensor) -> Tensor:
    """[B], of the true label."""
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]


def _inputs(batch: Batch) -> list[str]:
    """What a batch holds beside the label."""
    return [name for name in batch if name != "label"]


def _cross_entropy(log_probs: Tensor) -> float:
    """The mean over samples, added up as `cross_entropy` does from logits."""
    labels = torch.zeros(len(log_probs), dtype=torch.long, device=log_probs.device)
    return float(F.nll_loss(log_probs[:, None], labels))
