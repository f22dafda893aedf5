"""Autoregressive language models: each block and the joint prediction at sigma_max, and a cross-entropy per
level.

At sigma_max the noisy token says nothing, so a block's cross-entropy is a plain next-token prediction,
comparable with an ordinary model's. The joint prediction averages the log-probabilities of all blocks there
(renormalised): one pass over as many layers as the ordinary model has, with a perplexity, temperature and
top-p.
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
from lowmem.inference.evaluation.common import Draws, Part, Walks, headline, test_batches
from lowmem.inference.frozen_run import FrozenRun
from lowmem.models.base import BlockModel
from lowmem.noise import euler_step, sigma_at
from lowmem.objectives.base import mean_cosine
from lowmem.objectives.tokens import HEALTH_ROWS, TokenDenoising
from lowmem.recipe import NoiseConfig
from lowmem.schedule import mix_seed

Figures = defaultdict[tuple[str, int, str], list[Tensor]]  # (what, which, figure) -> a value per sequence


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    recipe = frozen.plan.recipe
    if recipe.whole:
        return {**headline(frozen.losses(test_batches(frozen, data))), "per_block": []}
    num_steps = len(frozen.blocks) if recipe.eval.num_steps == "auto" else recipe.eval.num_steps
    return evaluate_blocks(frozen, data, num_steps)


def evaluate_blocks(frozen: FrozenRun, data: Dataset, num_steps: int) -> dict[str, Any]:
    """All figures of a model in blocks; the chain takes `num_steps` steps."""
    _, objective = frozen.parts(BlockModel, TokenDenoising)
    walks = _Walks(frozen, data, num_steps)
    for number, parts in enumerate(walks.groups):
        walks.walk(number, parts)
    figures = {name: float(torch.cat(values).mean()) for name, values in walks.figures.items()}

    def row(what: str, which: int, names: dict[str, str]) -> dict[str, float]:
        return {name: figures[what, which, figure] for name, figure in names.items()}

    joint = headline(torch.cat(walks.figures["joint", 0, "ce"]))
    of_level = {"ce": "ce", "ce_shuffled": "ce_shuffled", "cosine": "cosine"}
    of_call = {**of_level, "oracle_ce": "oracle_ce", "oracle_cosine": "oracle_cosine"}
    return {
        **joint,
        "sigma_max_ce": joint["value"],
        "per_block": [
            {"block": block, "sigma_max_ce": figures["alone", block, "ce"]} for block in frozen.blocks
        ],
        "levels": [
            {"sigma": sigma, "block": block, **row("level", i, of_level)}
            for i, (block, sigma) in enumerate(walks.levels)
        ],
        "num_steps": num_steps,
        "chain": [
            {"sigma": sigma, "block": block, **row("chain", i, of_call)}
            for i, (block, sigma, _) in enumerate(walks.calls)
        ],
        "table_cosine": mean_cosine(objective.model.target_table()[:HEALTH_ROWS]),
    }


class _Walks:
    """Groups of the test part pass the blocks; every group leaves its figures of each sequence."""

    def __init__(self, frozen: FrozenRun, data: Dataset, num_steps: int) -> None:
        _, self._objective = frozen.parts(BlockModel, TokenDenoising)
        self._frozen, self._noise, num_blocks = frozen, self._objective.noise, len(frozen.blocks)
        self.groups, self.figures = Walks(frozen, data), Figures(list)
        self.calls = [(b, *call) for b, calls in frozen.schedule(num_steps) for call in calls]
        self.levels = [(b, sigma) for b in frozen.blocks for sigma in levels_of(b, num_blocks, self._noise)]
        row = frozen.plan.recipe.train.seq_len or 1, self._objective.target_shape()[1]
        seed = mix_seed(frozen.plan.recipe.train.seed, "evaluate")
        num_sites = 1 + len(self.calls) + len(self.levels)
        self._draws = Draws(seed, row, self.groups.sizes, num_sites)

    def walk(self, group: int, parts: list[Part]) -> None:
        objective, device, sigma_max = self._objective, self._frozen.device, self._noise.sigma_max
        self._draws.go_to(group, 0)
        scale = math.sqrt(1 + sigma_max**2)
        top = [(self._draws.rows(len(part)) * scale).to(device) for part in parts]
        # What waits keeps its memory. In new memory at every call it would split the heap's free memory.
        z, mean_features, site = [each.clone() for each in top], [torch.zeros_like(each) for each in top], 0
        for block, layers in self._frozen.walk(self._frozen.blocks):
            # a plain predictor from pure noise
            for part, noise, total in zip(parts, top, mean_features, strict=True):
                features = objective.features(layers, part.batch, noise, _full(part, sigma_max))
                self._predicted("alone", block, part, features, noise)
                total += features / len(self._frozen.blocks)
            # the paper's sampler, given the true clean context: this block's share of the way down
            for i, (owner, sigma, following) in enumerate(self.calls):
                if owner == block:
                    self._draws.go_to(group, site := site + 1)
                    for place, part in enumerate(parts):
                        z[place].copy_(self._chain(i, layers, part, z[place], sigma, following))
            for i, (owner, sigma) in enumerate(self.levels):
                if owner == block:
                    self._draws.go_to(group, site := site + 1)
                    for part in parts:
                        self._oracle(i, layers, part, sigma)
        # The head is linear: the mean of the blocks' features gives the mean of their logits, and that is the
        # mean of their log-probabilities once renormalised.
        for part, noise, total in zip(parts, top, mean_features, strict=True):
            self._predicted("joint", 0, part, total.to(self._frozen.dtype), noise)

    def _predicted(self, what: str, which: int, part: Part, features: Tensor, z: Tensor) -> None:
        """Cross-entropy at sigma_max from features [B, L, D]."""
        level = _full(part, self._noise.sigma_max)
        losses = self._objective.predictions(features, part.batch["tokens"], z, level)[0]
        self.figures[what, which, "ce"].append(losses.mean(1))

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
        true = self._call(layers, part, self._true_z(part, sigma), sigma)[:2]
        shuffled = self._call(layers, part, z, sigma, shuffle=True)[0]
        ce, cosine, denoised = self._call(layers, part, z, sigma)
        found = {"ce": ce, "ce_shuffled": shuffled, "cosine": cosine}
        self._keep("chain", which, {**found, "oracle_ce": true[0], "oracle_cosine": true[1]})
        return z if following is None else euler_step(z, denoised, sigma, following)

    def _oracle(self, which: int, layers: Iterable[nn.Module], part: Part, sigma: float) -> None:
        """On z made from the true tokens: with the true clean context, and with another sequence's."""
        z = self._true_z(part, sigma)
        ce, cosine = self._call(layers, part, z, sigma)[:2]
        shuffled = self._call(layers, part, z, sigma, shuffle=True)[0]
        self._keep("level", which, {"ce": ce, "ce_shuffled": shuffled, "cosine": cosine})

    def _call(
        self, layers: Iterable[nn.Module], part: Part, z: Tensor, sigma: float, shuffle: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`shuffle`: every sequence is given another one's clean context."""
        context = part.shuffled("tokens") if shuffle else part.batch
        return self._objective.scored(layers, context, part.batch["tokens"], z, _full(part, sigma))

    def _true_z(self, part: Part, sigma: float) -> Tensor:
        clean = F.embedding(part.batch["tokens"], self._objective.model.target_table())
        return clean + sigma * self._draws.rows(len(part)).to(clean.device)

    def _keep(self, what: str, which: int, found: dict[str, Tensor]) -> None:
        for name, value in found.items():
            self.figures[what, which, name].append(value)


def _full(part: Part, sigma: float) -> Tensor:
    tokens = part.batch["tokens"]
    return torch.full(tokens.shape, sigma, device=tokens.device)


def levels_of(block: int, num_blocks: int, noise: NoiseConfig) -> list[float]:
    """The middle of the block's interval by probability; for the first block sigma_max too, for the last
    sigma_min.
    """
    top = [noise.sigma_max] if block == 0 else []
    bottom = [noise.sigma_min] if block == num_blocks - 1 else []
    return [*top, sigma_at(1 - (block + 0.5) / num_blocks, noise), *bottom]
