"""Autoregressive language models: each block and the joint prediction at sigma_max, a cross-entropy per
level, and generated text.

At sigma_max the noisy token says nothing, so a block's cross-entropy is a plain next-token prediction,
comparable with an ordinary model's. The joint prediction averages the log-probabilities of all blocks there
(renormalised): one pass over as many layers as the ordinary model has, with a perplexity, temperature and
top-p.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.common import test_batches
from lowmem.inference.frozen_run import FrozenRun, initial_noise
from lowmem.models.base import Batch
from lowmem.models.causal_lm import CausalLm
from lowmem.noise import euler_step, sigma_at
from lowmem.objectives.base import mean_cosine
from lowmem.objectives.tokens import HEALTH_ROWS, TokenDenoising
from lowmem.recipe import NoiseConfig
from lowmem.schedule import mix_seed


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    model, objective = _parts(frozen)
    plan, noise = frozen.plan, frozen.plan.noise
    batches = test_batches(frozen, data)
    if plan.recipe.method == "end_to_end":
        return {**headline(frozen.losses(batches)), "per_block": []}

    num_blocks = plan.settings.num_blocks
    num_steps = num_blocks if plan.recipe.eval.num_steps == "auto" else plan.recipe.eval.num_steps
    schedule = dict(frozen.schedule(num_steps))
    table = model.target_table()
    torch.manual_seed(mix_seed(plan.recipe.train.seed, "evaluate"))
    top_noise = [
        initial_noise((*batch["tokens"].shape, table.shape[1]), noise.sigma_max).to(frozen.device)
        for batch in batches
    ]
    top_levels = [_full(batch, noise.sigma_max) for batch in batches]
    own_z, mean_features = top_noise, [torch.zeros_like(z) for z in top_noise]
    per_block, levels, chain = [], [], []
    for block, layers in frozen.walk(range(num_blocks)):
        # a plain predictor from pure noise
        alone = []
        for total, batch, z, level in zip(mean_features, batches, top_noise, top_levels, strict=True):
            features = objective.features(model, layers, batch, z, level, noise)
            alone.append(objective.predictions(model, features, batch["tokens"], z, level)[0].mean(1))
            total += features / num_blocks
        per_block.append({"block": block, "sigma_max_ce": float(torch.cat(alone).mean())})
        # the paper's sampler, given the true clean context: this block's share of the way down, beside the
        # oracle's z at the same level
        for sigma, following in schedule.get(block, []):
            own, own_shuffled = (
                _call(frozen, layers, batches, own_z, sigma, shuffle) for shuffle in (False, True)
            )
            oracle = _call(frozen, layers, batches, _true_z(frozen, batches, sigma), sigma)
            figures = {
                "ce": own.ce,
                "ce_shuffled": own_shuffled.ce,
                "cosine": own.cosine,
                "oracle_ce": oracle.ce,
                "oracle_cosine": oracle.cosine,
            }
            chain.append({"sigma": sigma, "block": block, **figures})
            if following is not None:
                own_z = [
                    euler_step(z, denoised, sigma, following)
                    for z, denoised in zip(own_z, own.denoised, strict=True)
                ]
        levels += [
            {"sigma": sigma, "block": block, **_oracle(frozen, layers, batches, sigma)}
            for sigma in _levels(block, num_blocks, noise)
        ]
    # the head is linear: the mean of the blocks' features gives the mean of their logits, which is that of
    # their log-probabilities once renormalised
    joint = [
        objective.predictions(model, features.to(model.head.weight.dtype), batch["tokens"], z, level)[0].mean(
            1
        )
        for features, batch, z, level in zip(mean_features, batches, top_noise, top_levels, strict=True)
    ]
    figures = headline(torch.cat(joint))
    return {
        **figures,
        "sigma_max_ce": figures["value"],
        "per_block": per_block,
        "levels": levels,
        "num_steps": num_steps,
        "chain": chain,
        "table_cosine": mean_cosine(table[:HEALTH_ROWS]),
    }


def _levels(block: int, num_blocks: int, noise: NoiseConfig) -> list[float]:
    """The middle of the block's interval by probability; sigma_max too for the first block, sigma_min for the
    last.
    """
    middle = sigma_at(1 - (block + 0.5) / num_blocks, noise)
    return [
        *([noise.sigma_max] if block == 0 else []),
        middle,
        *([noise.sigma_min] if block == num_blocks - 1 else []),
    ]


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
    model, objective = _parts(frozen)
    losses, cosines, estimates = [], [], []
    for batch, z in zip(batches, noisy, strict=True):
        tokens, level = batch["tokens"], _full(batch, sigma)
        context = {"tokens": tokens.roll(1, 0)} if shuffle else batch
        features = objective.features(model, layers, context, z, level, frozen.plan.noise)
        loss, denoised = objective.predictions(model, features, tokens, z, level)
        losses.append(loss.mean(1))
        cosines.append(
            F.cosine_similarity(denoised, F.embedding(tokens, model.target_table()), dim=-1).mean(1)
        )
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
    model, _ = _parts(frozen)
    y = [F.embedding(batch["tokens"], model.target_table()) for batch in batches]
    return [clean + sigma * torch.randn_like(clean) for clean in y]


def _full(batch: Batch, sigma: float) -> Tensor:
    return torch.full(batch["tokens"].shape, sigma, device=batch["tokens"].device)


def nll(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return -log_probs.gather(-1, tokens[..., None])[..., 0]


def headline(losses: Tensor) -> dict[str, Any]:
    """Nats per token, over sequences, with the standard error of the mean."""
    error = float(losses.std() / math.sqrt(len(losses))) if len(losses) > 1 else None
    return {
        "metric": "cross_entropy",
        "value": float(losses.mean()),
        "value_std_error": error,
        "perplexity": math.exp(float(losses.mean())),
    }


def _parts(frozen: FrozenRun) -> tuple[CausalLm, TokenDenoising]:
    model, objective = frozen.model, frozen.model.objective
    assert isinstance(model, CausalLm) and isinstance(objective, TokenDenoising)
    return model, objective
