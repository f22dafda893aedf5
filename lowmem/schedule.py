"""What depends on the step alone: the learning rate, and the seed of everything random."""

from __future__ import annotations

import hashlib
import math

from lowmem.recipe import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """A linear warm-up to `lr`, then constant or a cosine down to 0. `step`: counted per block, from 0."""
    warm = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    if train.lr_schedule == "constant":
        return train.lr * warm
    return train.lr * warm * 0.5 * (1 + math.cos(math.pi * step / train.num_steps))


def mix_seed(*parts: object) -> int:
    """A 63-bit seed from numbers and words. Other parts give other draws, which `seed + step` does not."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
