"""Image generators: the Fréchet distance of samples to the test images, each block's loss, the loss per level.

The Fréchet distance is taken in a fixed feature space, not in Inception's: a small convolutional network trained here, on the
run's own training images, to tell their classes apart (`feature_network`). It is the same for every run on the same data, so
runs compare with each other; a figure means little beside another data set's, and nothing beside a published FID.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.config import EvalConfig
from lowmem.data import Dataset
from lowmem.data_config import LatentArraysData
from lowmem.data_images import pillow
from lowmem.evaluation.common import test_batches
from lowmem.noise import block_interval, block_of, boundaries, euler_step, sample_sigma, sigma_at
from lowmem.objectives.images import ImageDenoising
from lowmem.sampler import FrozenRun, initial_noise
from lowmem.schedule import mix_seed

NUM_STEPS, GUIDANCE = 18, 2.0  # where the recipe says auto: EDM's number of steps for small images, the paper's guidance
FEATURES = 64  # dimension of the space in which the Fréchet distance is taken
FEATURE_IMAGES, FEATURE_STEPS, FEATURE_BATCH = 6000, 700, 64  # the feature network's training
GRID_SIDE, GRID_GAP = 32, 2  # pixels: smaller images are magnified to about that side; between images


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    recipe = frozen.plan.recipe
    seed, config = mix_seed(recipe.train.seed, "evaluate"), recipe.eval
    num_steps, guidance = sampling_settings(config)
    network = feature_network(data)
    tests = list(data.test_batches(config.batch_size))
    test, test_labels = (torch.from_numpy(np.concatenate([batch[name] for batch in tests])) for name in ("image", "label"))
    labels = test_labels[torch.arange(config.num_samples) % len(test_labels)]  # the test part's share of each class
    made = sample(frozen, labels, num_steps, guidance, seed)
    real_features, _ = _features(network, *_training_images(data, 0))
    test_features, test_right = _features(network, test, test_labels)
    made_features, made_right = _features(network, made, labels)
    return {
        "metric": "frechet",
        "value": frechet(made_features, test_features),
        "frechet_train_test": frechet(real_features, test_features),  # the floor: what training images themselves score
        "class_accuracy": made_right,  # of the feature network, on samples: how often it sees the class that was asked for
        "class_accuracy_test": test_right,
        "num_samples": config.num_samples,
        "num_steps": num_steps,
        "guidance": guidance,
        **_losses(frozen, data, seed),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def sampling_settings(config: EvalConfig) -> tuple[int, float]:
    """(steps of the chain, guidance)."""
    return NUM_STEPS if config.num_steps == "auto" else config.num_steps, GUIDANCE if config.guidance == "auto" else config.guidance


@torch.no_grad()
def sample(frozen: FrozenRun, labels: Tensor, num_steps: int, guidance: float, seed: int) -> Tensor:
    """Images [N, C, H, W] in [-1, 1], or latents, of the given classes [N], on the CPU: the blocks in order, each for its share of the steps.

    Euler steps down from sigma_max, the last call returns D itself (paper, section 3.3). Guidance: D_none + guidance (D_class - D_none).
    """
    model, objective, noise = frozen.model, frozen.model.objective, frozen.plan.noise
    assert isinstance(objective, ImageDenoising)
    size = frozen.plan.recipe.eval.batch_size
    classes = torch.split(labels.to(frozen.device), size)
    torch.manual_seed(seed)
    start = initial_noise((len(labels), *model.example_batch(1)["image"].shape[1:]), noise.sigma_max).to(frozen.device)
    parts = list(torch.split(start, size))
    schedule = dict(frozen.schedule(num_steps))
    for block, layers in _walk(frozen, list(schedule)):
        for sigma, following in schedule[block]:
            for i, (z, label) in enumerate(zip(parts, classes, strict=True)):
                level = z.new_full((len(z),), sigma)
                denoised = objective.denoised(model, layers, {"label": label}, z, level, noise)
                if guidance != 1:
                    without = torch.full_like(label, model.num_classes)  # type: ignore[arg-type]
                    unguided = objective.denoised(model, layers, {"label": without}, z, level, noise)
                    denoised = unguided + guidance * (denoised - unguided)
                parts[i] = denoised if following is None else euler_step(z, denoised, sigma, following)
    made = objective.image(torch.cat(parts), noise).cpu()
    return made if isinstance(frozen.plan.recipe.data, LatentArraysData) else made.clamp(-1, 1)


def _walk(frozen: FrozenRun, blocks: Sequence[int]) -> Iterator[tuple[int, Iterable[nn.Module]]]:
    """Each block with the layers that serve its levels: its own, or all of them in a model trained end to end."""
    if frozen.plan.recipe.method == "end_to_end":
        with frozen.on_device(range(frozen.plan.settings.num_blocks)) as layers:
            yield from ((block, layers) for block in blocks)
    else:
        yield from frozen.walk(blocks)


# ---------------------------------------------------------------------------------------------------------------------
# Losses on the test images


def _losses(frozen: FrozenRun, data: Dataset, seed: int) -> dict[str, Any]:
    """`per_block`: the loss on the block's own levels, drawn as in training. `levels`: at one level, with the true class and with another's."""
    plan = frozen.plan
    batches = test_batches(frozen, data)
    noise, num_blocks = plan.noise, plan.settings.num_blocks
    borders = boundaries(num_blocks, noise)
    wanted = sorted({noise.sigma_min, noise.sigma_max, *(sigma_at((b + 0.5) / num_blocks, noise) for b in range(num_blocks))}, reverse=True)
    per_block, levels = [], []
    for block, layers in _walk(frozen, range(num_blocks)):
        interval = block_interval(block, num_blocks, noise)
        torch.manual_seed(mix_seed(seed, block))
        drawn = [sample_sigma(torch.rand(len(b["label"]), device=frozen.device), interval, noise) for b in batches]
        per_block.append({"block": block, "loss": _loss(frozen, layers, batches, drawn), "num_samples": sum(map(len, drawn))})
        for sigma in wanted:
            if block_of(sigma, borders) == block:
                fixed = [torch.full_like(b["label"], 1, dtype=torch.float32) * sigma for b in batches]
                shuffled = [{**b, "label": b["label"].roll(1, 0)} for b in batches]
                torch.manual_seed(mix_seed(seed, block, sigma))
                true = _loss(frozen, layers, batches, fixed)
                torch.manual_seed(mix_seed(seed, block, sigma))  # the same noise: only the class differs
                levels.append({"sigma": sigma, "block": block, "loss": true, "loss_shuffled": _loss(frozen, layers, shuffled, fixed)})
    return {"per_block": per_block, "levels": levels}


def _loss(frozen: FrozenRun, layers: Iterable[nn.Module], batches: list[dict[str, Tensor]], sigmas: list[Tensor]) -> float:
    objective, noise = frozen.model.objective, frozen.plan.noise
    assert isinstance(objective, ImageDenoising)
    losses = []
    for batch, sigma in zip(batches, sigmas, strict=True):
        y = objective.target(batch["image"], noise)
        losses.append(objective.loss(objective.denoised(frozen.model, layers, batch, objective.noised(y, sigma), sigma, noise), y, sigma, noise))
    return float(torch.cat(losses).mean())


# ---------------------------------------------------------------------------------------------------------------------
# The feature space


class FeatureNetwork(nn.Module):
    """Three convolutions, the mean over pixels, and 64 features below a linear read-out of the classes."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * 64, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return torch.as_tensor(self.body(images))


_networks: dict[tuple[int, bytes], FeatureNetwork] = {}


def feature_network(data: Dataset, seed: int = 0) -> FeatureNetwork:
    """The feature space of a data set: a function of its training part and `seed`, trained on the CPU in seconds, once in a process.

    700 steps of Adam over batches of 64, with a linear decay of the rate, on at most 6,000 training images.
    """
    x, wanted = _training_images(data, seed)
    key = seed, hashlib.sha256(x.numpy().tobytes() + wanted.numpy().tobytes()).digest()
    if key not in _networks:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(mix_seed(seed, "feature_network"))
            network = FeatureNetwork(x.shape[1], int(wanted.max()) + 1)
            optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
            for step in range(FEATURE_STEPS):
                batch = torch.randint(len(x), (FEATURE_BATCH,))
                optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / FEATURE_STEPS)
                optimizer.zero_grad()
                F.cross_entropy(network.head(network(x[batch])), wanted[batch]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        _networks[key] = network.eval().requires_grad_(False)
    return _networks[key]


def _training_images(data: Dataset, seed: int) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] and labels [N], N at most 6,000: the first of an epoch's permutation."""
    batch = data.batch(seed, 0, min(FEATURE_IMAGES, data.num_train))
    return torch.from_numpy(batch["image"]), torch.from_numpy(batch["label"])


def _features(network: FeatureNetwork, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Features [N, 64], and the share of images that the network puts in the class of `labels`."""
    features = torch.cat([network(part) for part in torch.split(images, 1000)])
    return features, float((network.head(features).argmax(-1) == labels).float().mean())


def frechet(features_a: Tensor, features_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) of two sets of features [N, D], in float64.

    tr (C_a C_b)^1/2 = tr (S C_b S)^1/2 with S = C_a^1/2: symmetric, so eigenvalues are real and a square root is theirs.
    """
    a, b = features_a.double(), features_b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


# ---------------------------------------------------------------------------------------------------------------------
# A picture


def write_grid(images: Tensor, path: Path, columns: int) -> None:
    """A PNG of images [N, C, H, W] in [-1, 1], C = 1 or 3, row by row; small ones are magnified by a whole number."""
    image_module = pillow("samples: a PNG")
    count, channels, height, width = images.shape
    zoom = max(1, round(GRID_SIDE / max(height, width)))
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy().repeat(zoom, axis=1).repeat(zoom, axis=2)
    step_y, step_x, rows = zoom * height + GRID_GAP, zoom * width + GRID_GAP, -(-count // columns)
    canvas = np.full((rows * step_y - GRID_GAP, columns * step_x - GRID_GAP, channels), 255, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * step_y, i % columns * step_x
        canvas[top : top + zoom * height, left : left + zoom * width] = image
    image_module.fromarray(canvas[..., 0] if channels == 1 else canvas).save(path, format="PNG")
