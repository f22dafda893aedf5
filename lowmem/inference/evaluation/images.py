"""Image generators: the Fréchet distance of samples to the test images, each block's loss, and the loss per
level.

The Fréchet distance is taken in a feature space of our own (see `features`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.common import parts_of, test_batches
from lowmem.inference.evaluation.features import feature_network, features_of, frechet, training_images
from lowmem.inference.frozen_run import FrozenRun
from lowmem.inference.image_samples import sample
from lowmem.models.base import BlockModel
from lowmem.noise import block_of, boundaries, sample_sigma, sigma_at
from lowmem.objectives.base import Batch
from lowmem.objectives.images import ImageDenoising
from lowmem.planning.evaluation import sampling_settings
from lowmem.schedule import mix_seed


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    recipe = frozen.plan.recipe
    seed, config = mix_seed(recipe.train.seed, "evaluate"), recipe.eval
    num_steps, guidance = sampling_settings(config)
    network = feature_network(data, say=frozen.say)
    real_features, _ = features_of(network, *training_images(data, 0))
    frozen.size_for(data.num_test)
    tests = list(data.test_batches(config.batch_size))
    test, test_labels = (
        torch.from_numpy(np.concatenate([batch[name] for batch in tests])) for name in ("image", "label")
    )
    # classes in the shares that the test part has
    labels = test_labels[torch.arange(config.num_samples) % len(test_labels)]
    test_features, test_right = features_of(network, test, test_labels)
    del tests, test
    made = sample(frozen, labels, num_steps, guidance, seed)
    made_features, made_right = features_of(network, made, labels)
    return {
        "metric": "frechet",
        "value": frechet(made_features, test_features),
        "frechet_train_test": frechet(real_features, test_features),  # the floor: what training images score
        "class_accuracy": made_right,  # how often the feature network sees the class that was asked for
        "class_accuracy_test": test_right,
        "num_samples": config.num_samples,
        "num_steps": num_steps,
        "guidance": guidance,
        **_losses(frozen, data, seed),
    }


def _losses(frozen: FrozenRun, data: Dataset, seed: int) -> dict[str, Any]:
    """`per_block`: the loss on the block's own levels, drawn as in training.

    `levels`: the loss at one level, with the true class and with another image's.
    """
    batches, objective, num_blocks = test_batches(frozen, data), frozen.objective, len(frozen.blocks)
    noise = objective.noise
    borders = boundaries(num_blocks, noise)
    middles = (sigma_at((b + 0.5) / num_blocks, noise) for b in range(num_blocks))
    wanted = sorted({noise.sigma_min, noise.sigma_max, *middles}, reverse=True)
    per_block, levels = [], []
    for block, layers in frozen.walk_owners(frozen.blocks):
        interval = objective.interval(block, num_blocks)
        torch.manual_seed(mix_seed(seed, block))
        sizes = [len(batch["label"]) for batch in batches]
        drawn = [sample_sigma(torch.rand(size, device=frozen.device), interval, noise) for size in sizes]
        loss = _loss(frozen, layers, batches, drawn)
        per_block.append({"block": block, "loss": loss, "num_samples": sum(sizes)})
        for sigma in wanted:
            if block_of(sigma, borders) == block:
                fixed = [torch.full_like(b["label"], 1, dtype=torch.float32) * sigma for b in batches]
                shuffled = [{**b, "label": b["label"].roll(1, 0)} for b in batches]
                torch.manual_seed(mix_seed(seed, block, sigma))
                true = _loss(frozen, layers, batches, fixed)
                torch.manual_seed(mix_seed(seed, block, sigma))  # the same noise: only the class differs
                other = _loss(frozen, layers, shuffled, fixed)
                levels.append({"sigma": sigma, "block": block, "loss": true, "loss_shuffled": other})
    return {"per_block": per_block, "levels": levels}


def _loss(
    frozen: FrozenRun, layers: Iterable[nn.Module], batches: list[Batch], sigmas: list[Tensor]
) -> float:
    _, objective = frozen.parts(BlockModel, ImageDenoising)
    losses = []
    for batch, sigma in zip(batches, sigmas, strict=True):
        y = objective.target(batch["image"])
        z = objective.noised(y, sigma)  # drawn for the whole batch
        for part in parts_of(frozen, batch):
            rows = slice(part.start, part.stop)
            denoised = objective.denoised(layers, part.batch, z[rows], sigma[rows])
            losses.append(objective.loss(denoised, y[rows], sigma[rows]))
    return float(torch.cat(losses).mean())
