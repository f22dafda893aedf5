"""Classifiers: the chain, the joint prediction, each block alone, and a cross-entropy per noise level.

A cross-entropy averaged over levels says nothing for a discrete target (at low sigma the label can be read off z), so each
level stands alone, with the true image and with another sample's: their gap is what the block takes from its input. At
sigma_max it is a plain prediction, comparable with an ordinary model's.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.data import Dataset
from lowmem.evaluation.common import test_batches
from lowmem.models.base import Batch
from lowmem.noise import block_of, boundaries, euler_step, sigma_at
from lowmem.objectives.base import mean_cosine
from lowmem.objectives.labels import LabelDenoising
from lowmem.sampler import FrozenRun, initial_noise
from lowmem.schedule import mix_seed


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    plan = frozen.plan
    if plan.recipe.method == "end_to_end":
        return classify_end_to_end(frozen, data)
    num_steps = plan.settings.num_blocks if plan.recipe.eval.num_steps == "auto" else plan.recipe.eval.num_steps
    return classify_blocks(frozen, data, num_steps)


def classify_end_to_end(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    objective = frozen.model.objective
    assert isinstance(objective, LabelDenoising)
    batches = test_batches(frozen, data)
    with frozen.on_device(range(frozen.plan.settings.num_blocks)) as layers:
        logits = torch.cat([objective.end_to_end_logits(frozen.model, layers, batch) for batch in batches])
    labels = torch.cat([batch["label"] for batch in batches])
    return {"metric": "accuracy", "value": _accuracy(logits, labels), "cross_entropy": _cross_entropy(logits, labels), "per_block": []}


def classify_blocks(frozen: FrozenRun, data: Dataset, num_steps: int) -> dict[str, Any]:
    """All figures of a classifier in blocks, in one pass over the blocks; the chain takes `num_steps` steps."""
    plan, model, objective = frozen.plan, frozen.model, frozen.model.objective
    assert isinstance(objective, LabelDenoising)
    noise, num_blocks = plan.noise, plan.settings.num_blocks
    batches = test_batches(frozen, data)
    labels = torch.cat([batch["label"] for batch in batches])
    table: Tensor = model.target_table()  # type: ignore[operator]

    torch.manual_seed(mix_seed(plan.recipe.train.seed, "evaluate"))
    at_top = [initial_noise((len(b["label"]), table.shape[1]), noise.sigma_max).to(frozen.device) for b in batches]
    chain, chain_logits = list(at_top), at_top
    schedule = dict(frozen.schedule(num_steps))
    levels_of: dict[int, list[float]] = defaultdict(list)
    borders = boundaries(num_blocks, noise)
    for level in _levels(num_blocks, noise):
        levels_of[block_of(level, borders)].append(level)

    per_block, levels, chain_ce, log_probs = [], [], [], torch.zeros(len(labels), table.shape[0], device=frozen.device)
    for block, layers in frozen.walk(range(num_blocks)):
        # the paper's sampler: this block's share of the way down from sigma_max
        for sigma, following in schedule.get(block, []):
            chain_logits = [objective.logits(model, layers, b, z, _full(sigma, z), noise) for b, z in zip(batches, chain, strict=True)]
            chain_ce.append({"sigma": sigma, "block": block, "ce": _cross_entropy(torch.cat(chain_logits), labels)})
            if following is not None:
                chain = [euler_step(z, objective.denoised(model, out), sigma, following) for z, out in zip(chain, chain_logits, strict=True)]
        # this block as a plain predictor from pure noise
        alone = torch.cat([objective.logits(model, layers, b, z, _full(noise.sigma_max, z), noise) for b, z in zip(batches, at_top, strict=True)])
        log_probs += alone.log_softmax(-1) / num_blocks
        per_block.append({"block": block, "sigma_max_accuracy": _accuracy(alone, labels), "sigma_max_ce": _cross_entropy(alone, labels)})
        # its own levels, on the true z: with the true image and with another one
        for sigma in levels_of[block]:
            true, shuffled = _oracle(frozen, layers, batches, table, sigma)
            levels.append({"sigma": sigma, "block": block, "ce": true, "ce_shuffled": shuffled})
    return {
        "metric": "accuracy",
        "value": _accuracy(torch.cat(chain_logits), labels),
        "num_steps": num_steps,
        "joint_accuracy": _accuracy(log_probs, labels),
        "sigma_max_ce": _cross_entropy(log_probs, labels),
        "per_block": per_block,
        "levels": levels,
        "chain": chain_ce,
        "table_cosine": mean_cosine(table),
    }


def _oracle(frozen: FrozenRun, layers: list[Any], batches: list[Batch], table: Tensor, sigma: float) -> tuple[float, float]:
    """Cross-entropy at one level on z made from the true label: with the sample's own image, and with its neighbour's."""
    objective = frozen.model.objective
    assert isinstance(objective, LabelDenoising)
    out: list[list[Tensor]] = [[], []]
    for batch in batches:
        z = objective.noised(table[batch["label"]], torch.full_like(batch["label"], 1, dtype=torch.float32) * sigma)
        for place, image in enumerate((batch["image"], batch["image"].roll(1, 0))):
            out[place].append(objective.logits(frozen.model, layers, {**batch, "image": image}, z, _full(sigma, z), frozen.plan.noise))
    labels = torch.cat([batch["label"] for batch in batches])
    return _cross_entropy(torch.cat(out[0]), labels), _cross_entropy(torch.cat(out[1]), labels)


def _levels(num_blocks: int, noise: Any) -> list[float]:
    """sigma_max, the middle of each block's interval by probability, sigma_min."""
    return [noise.sigma_max, *(sigma_at(1 - (b + 0.5) / num_blocks, noise) for b in range(num_blocks)), noise.sigma_min]


def _full(sigma: float, z: Tensor) -> Tensor:
    return torch.full((len(z),), sigma, device=z.device)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).float().mean())


def _cross_entropy(logits: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(logits, labels))
