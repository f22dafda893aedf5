"""The feature space in which generated images are compared with real ones.

It is that of a small convolutional network, trained here on the run's own training images to tell their
classes apart, and not Inception's. It is the same for every run on the same data, so runs compare with each
other. A figure means little beside another data set's, and nothing beside a published FID.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from lowmem.data.cache import cache_dir, cached, digest
from lowmem.data.datasets import Dataset
from lowmem.errors import DataError
from lowmem.files import read_bytes
from lowmem.inference.progress import Progress, Say, silent
from lowmem.planning.evaluation import FEATURE_IMAGES
from lowmem.schedule import mix_seed
from lowmem.units import MIB

FEATURES = 64  # dimension of the space in which the Fréchet distance is taken
FEATURE_STEPS, FEATURE_BATCH = 700, 64  # the feature network's training
AT_ONCE = 100  # images of which the network's activations exist at once
VERSION = 1  # of how the network is made: another one has other files in the cache
MOST_FILE_BYTES = 64 * MIB
DIGEST = "sha256"  # the tensor of a kept network's file that holds the digest of the others


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


def feature_network(data: Dataset, seed: int = 0, say: Say = silent) -> FeatureNetwork:
    """The feature space of a data set: a function of its training part and `seed`.

    The network is trained on the CPU, once for these images: 700 steps of Adam over batches of 64, with a
    linear decay of the rate, on at most 6,000 training images. It is kept in the user's cache, under what it
    was trained on.
    """
    images, labels = training_images(data, seed)
    content = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    path = cache_dir() / f"{digest('features', VERSION, seed, list(images.shape), content)}.safetensors"
    with torch.device("meta"):
        network = FeatureNetwork(images.shape[1], int(labels.max()) + 1)
    if _load_kept(path, network):
        return network.eval().requires_grad_(False)
    network = _trained(images, labels, seed, say)
    with contextlib.suppress(DataError, OSError):  # a cache that cannot be written costs time, and no run
        path.unlink(missing_ok=True)  # what lies there is not what was written
        cached(path, lambda: [save(_with_digest(network.state_dict()))])
    return network


def _load_kept(path: Path, network: FeatureNetwork) -> bool:
    """Whether the kept network is now in `network`: a whole file of this user's own, of such a network."""
    try:
        if path.lstat().st_uid != getattr(os, "geteuid", lambda: 0)():
            return False
        tensors = load(read_bytes(path, MOST_FILE_BYTES, DataError))
        if not torch.equal(tensors.pop(DIGEST), _with_digest(tensors)[DIGEST]):
            return False
        network.load_state_dict(tensors, assign=True)
    except (OSError, DataError, SafetensorError, KeyError, RuntimeError, ValueError):
        return False
    return True


def _with_digest(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, and the sha256 of names and bytes as one more."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode() + tensors[name].numpy().tobytes())
    return {**tensors, DIGEST: torch.tensor(list(whole.digest()), dtype=torch.uint8)}


def _trained(images: Tensor, labels: Tensor, seed: int, say: Say = silent) -> FeatureNetwork:
    # One class alone teaches nothing: its loss is 0, and so is every gradient.
    steps = FEATURE_STEPS if int(labels.max()) > 0 else 0
    progress = Progress(say, "evaluation, the feature network of the data, once", steps)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(mix_seed(seed, "feature_network"))
        network = FeatureNetwork(images.shape[1], int(labels.max()) + 1)
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        for step in range(steps):
            batch = torch.randint(len(images), (FEATURE_BATCH,))
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / FEATURE_STEPS)
            optimizer.zero_grad()
            loss = F.cross_entropy(network.head(network(images[batch])), labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            progress.add(1)
    return network.eval().requires_grad_(False)


def training_images(data: Dataset, seed: int) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] and labels [N], N at most 6,000: the first of an epoch's permutation."""
    batch = data.batch(seed, 0, min(FEATURE_IMAGES, data.num_train))
    return torch.from_numpy(batch["image"]), torch.from_numpy(batch["label"])


def features_of(network: FeatureNetwork, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Features [N, 64], and the share of images that the network puts in the class of `labels`."""
    features = torch.cat([network(part) for part in torch.split(images, AT_ONCE)])
    return features, float((network.head(features).argmax(-1) == labels).float().mean())


def frechet(features_a: Tensor, features_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) of two sets of features [N, D], in float64.

    tr (C_a C_b)^1/2 = tr (S C_b S)^1/2 with S = C_a^1/2. That matrix is symmetric, so its eigenvalues are
    real and the trace is the sum of their roots.
    """
    a, b = features_a.double(), features_b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
