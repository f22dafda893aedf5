"""The feature space in which generated images are compared with real ones.

It is that of a small convolutional network, trained here on the run's own training images to tell their
classes apart, and not Inception's. It is the same for every run on the same data, so runs compare with each
other. A figure means little beside another data set's, and nothing beside a published FID.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.data.datasets import Dataset
from lowmem.planning.evaluation import FEATURE_IMAGES
from lowmem.schedule import mix_seed

FEATURES = 64  # dimension of the space in which the Fréchet distance is taken
FEATURE_STEPS, FEATURE_BATCH = 700, 64  # the feature network's training
AT_ONCE = 100  # images of which the network's activations exist at once
REMEMBERED = 4  # feature networks of a process: a run needs one, a comparison a few


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


_networks: OrderedDict[tuple[int, bytes], FeatureNetwork] = OrderedDict()  # oldest first


def feature_network(data: Dataset, seed: int = 0) -> FeatureNetwork:
    """The feature space of a data set: a function of its training part and `seed`.

    The network is trained on the CPU in seconds and remembered: 700 steps of Adam over batches of 64, with a
    linear decay of the rate, on at most 6,000 training images.
    """
    images, labels = training_images(data, seed)
    key = seed, hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).digest()
    if key not in _networks:
        _networks[key] = _trained(images, labels, seed)
        if len(_networks) > REMEMBERED:
            _networks.popitem(last=False)
    return _networks[key]


def _trained(images: Tensor, labels: Tensor, seed: int) -> FeatureNetwork:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(mix_seed(seed, "feature_network"))
        network = FeatureNetwork(images.shape[1], int(labels.max()) + 1)
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        # One class alone teaches nothing: its loss is 0, and so is every gradient.
        for step in range(FEATURE_STEPS if int(labels.max()) > 0 else 0):
            batch = torch.randint(len(images), (FEATURE_BATCH,))
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / FEATURE_STEPS)
            optimizer.zero_grad()
            loss = F.cross_entropy(network.head(network(images[batch])), labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
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
