"""Classifiers: the chain, the joint prediction, each block alone, and a cross-entropy per noise level.

A cross-entropy averaged over levels says nothing for a discrete target (at low sigma the label can be read
off z), so each level stands alone, with the true image and with another sample's: their gap is what the block
takes from its input. At sigma_max it is a plain prediction, comparable with an ordinary model's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.common import test_batches
from lowmem.inference.frozen_run import FrozenRun, initial_noise
from lowmem.models.base import Batch
from lowmem.noise import block_of, boundaries, euler_step, sigma_at
from lowmem.objectives.base import mean_cosine
from lowmem.objectives.labels import LabelDenoising
from lowmem.schedule import mix_seed


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    plan = frozen.plan
    if plan.recipe.method == "end_to_end":
        return classify_end_to_end(frozen, data)
    num_steps = (
        plan.settings.num_blocks if plan.recipe.eval.num_steps == "auto" else plan.recipe.eval.num_steps
    )
    return classify_blocks(frozen, data, num_steps)


def classify_end_to_end(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    objective = frozen.model.objective
    assert isinstance(objective, LabelDenoising)
    batches = test_batches(frozen, data)
    logits = frozen.whole(
        batches,
        lambda batch: objective.enter(frozen.model, batch, frozen.plan.noise),
        lambda _, h, entered: frozen.model.output_part(h, entered.cond).float(),
    )
    labels = torch.cat([batch["label"] for batch in batches])
    return {
        "metric": "accuracy",
        "value": _accuracy(logits, labels),
        "cross_entropy": _cross_entropy(logits, labels),
        "per_block": [],
    }


def classify_blocks(frozen: FrozenRun, data: Dataset, num_steps: int) -> dict[str, Any]:
    """All figures of a classifier in blocks, in one pass over the blocks; the chain takes `num_steps` steps."""
    plan, model, objective = frozen.plan, frozen.model, frozen.model.objective
    assert isinstance(objective, LabelDenoising)
    noise, num_blocks = plan.noise, plan.settings.num_blocks
    guidance = 1.0 if plan.recipe.eval.guidance == "auto" else plan.recipe.eval.guidance
    batches = test_batches(frozen, data)
    labels = torch.cat([batch["label"] for batch in batches])
    table: Tensor = model.target_table()  # type: ignore[operator]

    torch.manual_seed(mix_seed(plan.recipe.train.seed, "evaluate"))
    at_top = [
        initial_noise((len(b["label"]), table.shape[1]), noise.sigma_max).to(frozen.device) for b in batches
    ]
    chain, chain_logits = list(at_top), at_top
    schedule = dict(frozen.schedule(num_steps))
    levels_of: dict[int, list[float]] = defaultdict(list)
    borders = boundaries(num_blocks, noise)
    for level in _levels(num_blocks, noise):
        levels_of[block_of(level, borders)].append(level)

    per_block, levels, calls, log_probs = (
        [],
        [],
        [],
        torch.zeros(len(labels), table.shape[0], device=frozen.device),
    )
    for block, layers in frozen.walk(range(num_blocks)):
        # the paper's sampler: this block's share of the way down from sigma_max
        for sigma, following in schedule.get(block, []):
            chain_logits, shuffled = (
                [
                    objective.guided_logits(model, layers, seen(b), z, _full(sigma, z), noise, guidance)
                    for b, z in zip(batches, chain, strict=True)
                ]
                for seen in (dict, _shuffled)
            )
            denoised = [objective.denoised(model, out) for out in chain_logits]
            oracle = _oracle(frozen, layers, batches, table, sigma)
            figures = {
                "ce": _cross_entropy(torch.cat(chain_logits), labels),
                "ce_shuffled": _cross_entropy(torch.cat(shuffled), labels),
            }
            figures |= {
                "cosine": _cosine(torch.cat(denoised), table[labels]),
                "oracle_ce": oracle["ce"],
                "oracle_cosine": oracle["cosine"],
            }
            calls.append({"sigma": sigma, "block": block, **figures})
            if following is not None:
                chain = [
                    euler_step(z, estimate, sigma, following)
                    for z, estimate in zip(chain, denoised, strict=True)
                ]
        # this block as a plain predictor from pure noise
        alone = torch.cat(
            [
                objective.logits(model, layers, b, z, _full(noise.sigma_max, z), noise)
                for b, z in zip(batches, at_top, strict=True)
            ]
        )
        log_probs += alone.log_softmax(-1) / num_blocks
        per_block.append(
            {
                "block": block,
                "sigma_max_accuracy": _accuracy(alone, labels),
                "sigma_max_ce": _cross_entropy(alone, labels),
            }
        )
        # its own levels, on the true z: with the true image and with another one
        levels += [
            {"sigma": sigma, "block": block, **_oracle(frozen, layers, batches, table, sigma)}
            for sigma in levels_of[block]
        ]
    last, joint = _accuracy(torch.cat(chain_logits), labels), _accuracy(log_probs, labels)
    return {
        "metric": "accuracy",
        "value": joint if plan.recipe.eval.prediction == "joint" else last,
        "prediction": plan.recipe.eval.prediction,
        "num_steps": num_steps,
        "chain_accuracy": last,
        "joint_accuracy": joint,
        "sigma_max_ce": _cross_entropy(log_probs, labels),
        "per_block": per_block,
        "levels": levels,
        "chain": calls,  # on its own z, beside the oracle's at the same level
        "table_cosine": mean_cosine(table),
    }


def _oracle(
    frozen: FrozenRun, layers: Iterable[Any], batches: list[Batch], table: Tensor, sigma: float
) -> dict[str, float]:
    """One level on z made from the true label: with the sample's own image, and with its neighbour's."""
    objective = frozen.model.objective
    assert isinstance(objective, LabelDenoising)
    out: list[list[Tensor]] = [[], []]
    for batch in batches:
        z = objective.noised(
            table[batch["label"]], torch.full_like(batch["label"], 1, dtype=torch.float32) * sigma
        )
        for place, context in enumerate((batch, _shuffled(batch))):
            out[place].append(
                objective.logits(frozen.model, layers, context, z, _full(sigma, z), frozen.plan.noise)
            )
    labels = torch.cat([batch["label"] for batch in batches])
    true, shuffled = (torch.cat(logits) for logits in out)
    cosine = _cosine(objective.denoised(frozen.model, true), table[labels])
    return {
        "ce": _cross_entropy(true, labels),
        "ce_shuffled": _cross_entropy(shuffled, labels),
        "cosine": cosine,
    }


def _shuffled(batch: Batch) -> Batch:
    """Every sample with another one's image."""
    return {**batch, "image": batch["image"].roll(1, 0)}


def _cosine(denoised: Tensor, y: Tensor) -> float:
    """Of the denoised estimate with the true label's embedding."""
    return float(F.cosine_similarity(denoised, y, dim=-1).mean())


def _levels(num_blocks: int, noise: Any) -> list[float]:
    """sigma_max, the middle of each block's interval by probability, sigma_min."""
    return [
        noise.sigma_max,
        *(sigma_at(1 - (b + 0.5) / num_blocks, noise) for b in range(num_blocks)),
        noise.sigma_min,
    ]


def _full(sigma: float, z: Tensor) -> Tensor:
    return torch.full((len(z),), sigma, device=z.device)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).float().mean())


def _cross_entropy(logits: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(logits, labels))
