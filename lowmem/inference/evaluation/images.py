"""Image generators: the Fréchet distance of samples to the test images, each block's loss, the loss per
level.

The Fréchet distance is taken in a fixed feature space, not in Inception's: a small convolutional network
trained here, on the run's own training images, to tell their classes apart (`feature_network`). It is the
same for every run on the same data, so runs compare with each other; a figure means little beside another
data set's, and nothing beside a published FID.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.common import test_batches
from lowmem.inference.evaluation.features import _features, _training_images, feature_network, frechet
from lowmem.inference.frozen_run import FrozenRun
from lowmem.inference.image_samples import _walk, sample, sampling_settings
from lowmem.noise import block_interval, block_of, boundaries, sample_sigma, sigma_at
from lowmem.objectives.images import ImageDenoising
from lowmem.schedule import mix_seed


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    recipe = frozen.plan.recipe
    seed, config = mix_seed(recipe.train.seed, "evaluate"), recipe.eval
    num_steps, guidance = sampling_settings(config)
    network = feature_network(data)
    tests = list(data.test_batches(config.batch_size))
    test, test_labels = (
        torch.from_numpy(np.concatenate([batch[name] for batch in tests])) for name in ("image", "label")
    )
    labels = test_labels[
        torch.arange(config.num_samples) % len(test_labels)
    ]  # the test part's share of each class
    made = sample(frozen, labels, num_steps, guidance, seed)
    real_features, _ = _features(network, *_training_images(data, 0))
    test_features, test_right = _features(network, test, test_labels)
    made_features, made_right = _features(network, made, labels)
    return {
        "metric": "frechet",
        "value": frechet(made_features, test_features),
        "frechet_train_test": frechet(
            real_features, test_features
        ),  # the floor: what training images themselves score
        # of the feature network, on samples: how often it sees the class that was asked for
        "class_accuracy": made_right,
        "class_accuracy_test": test_right,
        "num_samples": config.num_samples,
        "num_steps": num_steps,
        "guidance": guidance,
        **_losses(frozen, data, seed),
    }


# ------------------------------------------------------------------------------------------------------------
# Sampling


# ------------------------------------------------------------------------------------------------------------
# Losses on the test images


def _losses(frozen: FrozenRun, data: Dataset, seed: int) -> dict[str, Any]:
    """`per_block`: the loss on the block's own levels, drawn as in training.

    `levels`: at one level, with the true class and with another's.
    """
    plan = frozen.plan
    batches = test_batches(frozen, data)
    noise, num_blocks = plan.noise, plan.settings.num_blocks
    borders = boundaries(num_blocks, noise)
    wanted = sorted(
        {
            noise.sigma_min,
            noise.sigma_max,
            *(sigma_at((b + 0.5) / num_blocks, noise) for b in range(num_blocks)),
        },
        reverse=True,
    )
    per_block, levels = [], []
    for block, layers in _walk(frozen, range(num_blocks)):
        interval = block_interval(block, num_blocks, noise)
        torch.manual_seed(mix_seed(seed, block))
        drawn = [
            sample_sigma(torch.rand(len(b["label"]), device=frozen.device), interval, noise) for b in batches
        ]
        per_block.append(
            {
                "block": block,
                "loss": _loss(frozen, layers, batches, drawn),
                "num_samples": sum(map(len, drawn)),
            }
        )
        for sigma in wanted:
            if block_of(sigma, borders) == block:
                fixed = [torch.full_like(b["label"], 1, dtype=torch.float32) * sigma for b in batches]
                shuffled = [{**b, "label": b["label"].roll(1, 0)} for b in batches]
                torch.manual_seed(mix_seed(seed, block, sigma))
                true = _loss(frozen, layers, batches, fixed)
                torch.manual_seed(mix_seed(seed, block, sigma))  # the same noise: only the class differs
                levels.append(
                    {
                        "sigma": sigma,
                        "block": block,
                        "loss": true,
                        "loss_shuffled": _loss(frozen, layers, shuffled, fixed),
                    }
                )
    return {"per_block": per_block, "levels": levels}


def _loss(
    frozen: FrozenRun, layers: Iterable[nn.Module], batches: list[dict[str, Tensor]], sigmas: list[Tensor]
) -> float:
    objective, noise = frozen.model.objective, frozen.plan.noise
    assert isinstance(objective, ImageDenoising)
    losses = []
    for batch, sigma in zip(batches, sigmas, strict=True):
        y = objective.target(batch["image"], noise)
        losses.append(
            objective.loss(
                objective.denoised(frozen.model, layers, batch, objective.noised(y, sigma), sigma, noise),
                y,
                sigma,
                noise,
            )
        )
    return float(torch.cat(losses).mean())


# ------------------------------------------------------------------------------------------------------------
# The feature space


# ------------------------------------------------------------------------------------------------------------
# A picture
